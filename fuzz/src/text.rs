//! Texts and what is made of them: chat templates, tokenizers, token files, data sets.

use std::fs;
use std::ops::ControlFlow;
use std::time::Duration;

use landmark_data::prepare::{Dataset, OnError, Options, Preparation, Vocabulary};
use landmark_data::{Batches, Landmarks, Stream, TokenFile, TokenFileInfo, TokenWriter, Tokenizer, Tokens};
use landmark_inference::{Message, Role, Template};
use serde_json::{Value, json};

use crate::place::{self, put};

/// Between the parts of an input that is text.
const BETWEEN: &str = "\n---\n";

/// A template, and texts that are said.
pub fn template(bytes: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(bytes) else { return false };
    let mut parts = text.split(BETWEEN);
    let source = parts.next().unwrap_or_default().to_string();
    let Ok(template) = Template::new(source, Some("<s>".into()), None) else { return false };
    let roles = [Role::System, Role::User, Role::Assistant].into_iter().cycle();
    let messages: Vec<Message> = parts.zip(roles).map(|(said, role)| Message { role, content: said.into() }).collect();
    template.render(&messages).is_ok()
}

pub fn template_seeds() -> Vec<Vec<u8>> {
    let sources = [
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n<|im_end|>\n' }}{% endif %}\
         {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
         {{ '<|im_start|>assistant\n' }}{% endif %}",
        "{%- macro say(m, i) -%}{{ m.content.strip().split(' ')|join('-')|upper }}{{ i * 2 // 3 }}{%- endmacro -%}{% set ns = namespace(n=0) %}\
         {% for m in messages[1:] if m.role is defined and m.role is string %}{% set ns.n = ns.n + loop.index0 %}{{ say(m, ns.n) }}{{ m|tojson }}\
         {% else %}{{ raise_exception('none') }}{% endfor %}{{ messages|length }}{{ 'ab' * 3 ~ bos_token }}{{ range(3)|list|last }}",
        "{% set x = messages|map(attribute='content')|list %}{{ x|sort|reverse|join }}{{ 'a-b'.replace('-', '+').title() }}{% filter indent(2) %}\
         {{ dict(a=1).items() }}{% endfilter %}{% for m in x %}{% break %}{% endfor %}",
    ];
    sources.iter().map(|source| [source, "Be kind.", "Hello", "Hi"].join(BETWEEN).into_bytes()).collect()
}

/// A `tokenizer.json`, and a text.
pub fn tokenizer(bytes: &[u8]) -> bool {
    let Ok(input) = str::from_utf8(bytes) else { return false };
    let (json, text) = input.split_once(BETWEEN).unwrap_or((input, "Anne was 27, and read it."));
    let Ok(tokenizer) = Tokenizer::from_json(json.as_bytes()) else { return false };
    let with = tokenizer.with_special_token("<landmark>").map(|(tokenizer, _)| tokenizer);
    for tokenizer in [Some(tokenizer), with.ok()].into_iter().flatten() {
        tokenizer.vocab_size();
        tokenizer.beginning();
        let ids = [tokenizer.encode(text), tokenizer.encode_with_special(text)].into_iter().flatten();
        for id in ids.flatten().chain([0, u32::MAX]).collect::<Vec<u32>>().chunks(16) {
            let _ = tokenizer.decode(id);
            let mut decoder = tokenizer.decoder();
            id.iter().for_each(|&id| drop(decoder.push(id)));
            let _ = decoder.finish();
        }
        let _ = tokenizer.encode_batch(&[text.to_string(), text.chars().rev().collect()]);
    }
    true
}

pub fn tokenizer_seeds() -> Vec<Vec<u8>> {
    let level =
        |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let file = |model: Value, normalizer: Value, cut: Value, decoder: Value| {
        let added = json!([{"id": 9, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": true, "normalized": false, "special": true}]);
        let file = json!({"version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": cut, "post_processor": null,
                          "decoder": decoder, "model": model});
        format!("{file}{BETWEEN}an na, </s> a1").into_bytes()
    };
    let vocab = json!({"a": 0, "n": 1, "an": 2, "na": 3, "▁": 4, "<unk>": 5, "1": 6, ",": 7, "Ġ": 8});
    let bpe = |ignore: bool| {
        json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
                     "fuse_unk": true, "byte_fallback": false, "ignore_merges": ignore, "vocab": vocab, "merges": [["a", "n"], ["n", "a"]]})
    };
    let digits =
        json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, level(true)]});
    let regex = json!({"type": "Split", "pattern": {"Regex": "(?i:'s)|\\p{N}{1,3}| ?[^\\s\\p{L}]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false});
    let spaces = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "NFKC"}]});
    let unspaces = json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                     {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    let pieces = json!({"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9, "vocab": vocab});
    let unigram = json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": [["<unk>", 0.0], ["an", -1.5], ["a", -2.0], ["▁", -2.5]]});
    let bert = json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true});
    vec![
        file(bpe(false), Value::Null, level(true), level(true)),
        file(bpe(true), Value::Null, digits, level(true)),
        file(
            bpe(false),
            json!({"type": "NFC"}),
            json!({"type": "Sequence", "pretokenizers": [regex, level(false)]}),
            level(true),
        ),
        file(bpe(false), spaces, Value::Null, unspaces),
        file(
            pieces,
            bert,
            json!({"type": "BertPreTokenizer"}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        ),
        file(
            unigram,
            Value::Null,
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        ),
    ]
}

/// The length of a token file's header, which its last four bytes are the checksum of; and where it has that of the rest.
const HEADER: usize = 128;
const BODY_CHECKSUM: usize = 40;

/// A token file: its checksums are made right, if the first byte says so; or a file of ids without a header.
pub fn tokens(bytes: &[u8]) -> bool {
    let Some((&kind, bytes)) = bytes.split_first() else { return false };
    let mut bytes = bytes.to_vec();
    if kind == 1 && bytes.len() >= HEADER {
        let body = crc32fast::hash(&bytes[HEADER..]);
        bytes[BODY_CHECKSUM..BODY_CHECKSUM + 4].copy_from_slice(&body.to_le_bytes());
        let header = crc32fast::hash(&bytes[..HEADER - 4]);
        bytes[HEADER - 4..HEADER].copy_from_slice(&header.to_le_bytes());
    }
    let path = place::folder("tokens").join(if kind == 2 { "text.bin" } else { "text.tokens" });
    // Mapped files are not written to.
    let _ = fs::remove_file(&path);
    put(&path, &bytes);
    let Ok(file) = TokenFile::open_by_extension(&path) else { return false };
    let whole = file.verify().is_ok();
    let _ = file.check_tokenizer(&Tokenizer::bytes());
    let end_of_text = file.info().and_then(|info| info.end_of_text);
    let vocabulary = file.info().map_or(u32::MAX, |info| info.vocab_size);
    assert!(!whole || (0..file.len()).all(|i| file.get(i).is_some_and(|id| id < vocabulary)));
    for document in 0..file.documents() {
        let range = file.document(document).expect("a document that the file counts");
        assert!(!whole || range.end <= file.len());
    }
    assert_eq!((file.get(file.len()), file.document(file.documents())), (None, None));
    let Ok(stream) = Stream::new(Tokens::from(file), Landmarks::Insert { id: vocabulary, mem_freq: 3 }) else {
        return false;
    };
    let (half, length) = (stream.len() / 2, stream.len());
    let _ = stream.read(half, 20);
    assert_eq!(stream.get(length), None);
    let Ok(batches) = Batches::new(stream, 2, 9, end_of_text) else { return false };
    batches.batch(1, 2);
    batches.sequential().take(100).for_each(drop);
    if let Ok(batches) = batches.whole_blocks() {
        batches.batch(1, 2);
    }
    whole
}

pub fn tokens_seeds() -> Vec<Vec<u8>> {
    let path = place::folder("tokens").join("seed.tokens");
    let file = |info: &TokenFileInfo| {
        let mut writer = TokenWriter::create(&path, info)?;
        for document in [&b"Anne was"[..], b"27 when she read this."] {
            writer.push(&document.iter().map(|&byte| byte.into()).collect::<Vec<u32>>())?;
            writer.end_document()?;
        }
        writer.finish()
    };
    let of_bytes = TokenFileInfo::of(&Tokenizer::bytes());
    let infos = [of_bytes.clone(), TokenFileInfo { vocab_size: 100_000, end_of_text: None, ..of_bytes }];
    let files = infos.iter().map(|info| {
        file(info).expect("a token file can be written");
        fs::read(&path).expect("a file that was just written")
    });
    let files: Vec<Vec<u8>> = files.collect();
    let kinds = [0, 1].into_iter().flat_map(|kind| files.iter().map(move |file| [&[kind][..], file].concat()));
    kinds.chain([b"\x02a\0b\0c\0d\0e\0f\0g\0h\0i\0j\0k\0l\0".to_vec()]).collect()
}

/// Names of the files of a data set, one of them the input's.
const FILES: [(&str, Dataset); 8] = [
    ("a.txt", Dataset::Text),
    ("a.txt.gz", Dataset::Text),
    ("a.txt.zst", Dataset::Text),
    ("a.parquet", Dataset::Text),
    ("train.jsonl", Dataset::ArxivMath),
    ("a.jsonl.gz", Dataset::RedPajama),
    ("a.jsonl.zst", Dataset::RedPajama),
    ("train.parquet", Dataset::ArxivMath),
];

/// A data set of one file: the first byte says of which kind, and whether bad input is left out.
pub fn prepare(bytes: &[u8]) -> bool {
    let Some((&kind, bytes)) = bytes.split_first() else { return false };
    let (name, dataset) = FILES[usize::from(kind) % FILES.len()];
    let place = place::folder("prepare");
    place::fill(&place, &[(name.to_string(), bytes.to_vec())]);
    let options = Options {
        dataset,
        places: vec![place.join(name)],
        field: "text".into(),
        val_fraction: None,
        on_error: if usize::from(kind) < FILES.len() { OnError::Skip } else { OnError::Stop },
        save_every: Duration::from_secs(60),
    };
    let out = place.join("out");
    let run = |preparation: Preparation| {
        preparation.run(&Vocabulary::Given(Tokenizer::bytes()), &out, &mut |_| ControlFlow::Continue(()))
    };
    let Ok(progress) = Preparation::find(options).and_then(run) else { return false };
    let train = TokenFile::open(out.join("train.tokens")).expect("what was prepared can be opened");
    assert_eq!(train.len(), progress.train_tokens);
    true
}

pub fn prepare_seeds() -> Vec<Vec<u8>> {
    let text = "Anne was 27.\nShe read this, \u{e9}.\n\nOnce more.\n";
    let records = "{\"text\": \"Anne was 27.\", \"meta\": {\"config\": \"arxiv\"}}\n\n{\"text\": \"\\u00e9\\ud83d\\ude00\"}\n{\"meta\": \"x\", \"text\": \"\"}\n";
    [(0, text), (4, records), (12, records)].map(|(kind, text)| [&[kind][..], text.as_bytes()].concat()).to_vec()
}
