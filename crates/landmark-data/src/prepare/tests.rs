//! Layouts and formats; below, bad input and preparations that are stopped, killed and taken up again.

mod bad_input;
mod resume;

use std::io::Write;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{DataFolder, TokenFile, Tokens};

const END: char = '\u{0}';

/// A folder with these files in it.
fn folder<C: AsRef<[u8]>>(files: &[(&str, C)]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (name, contents) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }
    dir
}

fn options(dir: &TempDir, dataset: Dataset, places: &[&str]) -> Options {
    Options {
        dataset,
        places: places.iter().map(|place| dir.path().join(place)).collect(),
        field: "text".into(),
        val_fraction: None,
        on_error: OnError::Stop,
        save_every: Duration::from_secs(10),
    }
}

fn bytes() -> Vocabulary {
    Vocabulary::Given(Tokenizer::bytes())
}

fn go_on(_: Event<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn prepare(options: Options, out: &Path) -> Result<Progress> {
    Preparation::find(options)?.run(&bytes(), out, &mut go_on)
}

/// A file's text, with each end-of-text shown as `END`.
fn text(file: &TokenFile) -> String {
    let ids: Vec<u32> = (0..file.len()).filter_map(|i| file.get(i)).collect();
    let bytes = ids.iter().map(|&id| if id == 256 { END as u8 } else { id as u8 }).collect();
    String::from_utf8(bytes).unwrap()
}

/// The texts of the sets that were prepared into `out`.
fn texts(out: &Path) -> (String, String, Option<String>) {
    let data = DataFolder::open(out).unwrap();
    assert_eq!(data.tokenizer.unwrap().fingerprint(), Tokenizer::bytes().fingerprint());
    (text(&data.train), text(&data.validation), data.test.as_ref().map(text))
}

/// Prepares and checks what is the same for all; the texts of the sets.
fn prepared(options: Options) -> Result<(String, String, Option<String>)> {
    let out = TempDir::new().unwrap();
    let out = out.path().join("deep/out");
    let summary = prepare(options, &out)?;
    let (train, validation, test) = texts(&out);
    assert_eq!(summary.bytes_done, summary.bytes_total);
    let lens = (train.len() as u64, validation.len() as u64, test.as_ref().map(|test| test.len() as u64));
    assert_eq!((summary.train_tokens, summary.validation_tokens, summary.test_tokens), lens);
    let ends =
        [Some(&train), Some(&validation), test.as_ref()].into_iter().flatten().map(|text| text.matches(END).count());
    assert_eq!(summary.documents, ends.sum::<usize>() as u64);
    // Nothing temporary is left.
    assert_eq!(fs::read_dir(&out).unwrap().count(), 3 + usize::from(test.is_some()));
    Ok((train, validation, test))
}

fn of_text(files: &[(&str, &str)], places: &[&str], val_fraction: f64) -> (String, String) {
    let dir = folder(files);
    let options = Options { val_fraction: Some(val_fraction), ..options(&dir, Dataset::Text, places) };
    let (train, validation, test) = prepared(options).unwrap();
    assert_eq!(test, None);
    (train, validation)
}

fn gz(contents: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(contents).unwrap();
    encoder.finish().unwrap()
}

fn zst(contents: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(contents).unwrap();
    encoder.finish().unwrap()
}

/// A table of texts and descriptions, some rows in a group.
fn parquet(rows: &[(Option<&str>, &str)], group: usize) -> Vec<u8> {
    let schema = "message rows { required int64 id; optional binary text (UTF8); optional binary meta (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
    for rows in rows.chunks(group) {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let ids: Vec<i64> = (0..rows.len() as i64).collect();
        column.typed::<parquet::data_type::Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let texts = rows.iter().map(|(text, _)| *text).collect::<Vec<_>>();
        for values in [texts, rows.iter().map(|(_, meta)| Some(*meta)).collect()] {
            let levels: Vec<i16> = values.iter().map(|value| value.is_some().into()).collect();
            let values: Vec<ByteArray> = values.into_iter().flatten().map(ByteArray::from).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.into_inner().unwrap()
}

fn lines(texts: &[&str]) -> String {
    texts
        .iter()
        .map(|text| serde_json::json!({"meta": {"url": [1, {}]}, "text": text, "n": null}).to_string() + "\n")
        .collect()
}

#[test]
fn folders_are_read_in_order_and_files_as_given() {
    let files = [
        ("in/b.txt", "B"),
        ("in/a.txt", "A"),
        ("in/sub/c.txt", "C"),
        ("in/notes.md", "no"),
        ("in/.h.txt", "no"),
        ("x.md", "X"),
    ];
    assert_eq!(of_text(&files, &["x.md", "in"], 0.0), ("X\0A\0B\0C\0".into(), String::new()));
}

#[test]
fn the_layout_of_pg19_keeps_its_division() {
    let mut files = vec![("pg/train/2.txt", "two"), ("pg/train/1.txt", "one"), ("pg/validation/3.txt", "three")];
    for dataset in [Dataset::Pg19, Dataset::Text] {
        let expected = ("one\0two\0".into(), "three\0".into(), None);
        assert_eq!(prepared(options(&folder(&files), dataset, &["pg"])).unwrap(), expected);
    }
    files.extend([("pg/test/4.txt", "4"), ("pg/metadata.csv", "x")]);
    let dir = folder(&files);
    let expected = ("one\0two\0".into(), "three\0".into(), Some("4\0".into()));
    assert_eq!(prepared(options(&dir, Dataset::Pg19, &["pg"])).unwrap(), expected);

    let error = prepared(options(&dir, Dataset::Pg19, &["pg/train"])).unwrap_err();
    assert!(error.to_string().contains("needs folders train and validation"), "{error}");
    let error = prepared(Options { val_fraction: Some(0.1), ..options(&dir, Dataset::Pg19, &["pg"]) }).unwrap_err();
    assert!(matches!(error, Error::Param { name: "val_fraction", .. }));
}

#[test]
fn one_book_is_cut_at_the_end_of_a_line() {
    let cut = |book, fraction| of_text(&[("b.txt", book)], &["b.txt"], fraction);
    let expected = ("line one\nline two\nline three\n\0".into(), "line four\n\0".into());
    assert_eq!(cut("line one\nline two\nline three\nline four\n", 0.5), expected);
    // A place that is already one is kept; text without lines is cut at a space, or between characters.
    assert_eq!(cut("abcd\nefgh\n", 0.5).0, "abcd\n\0");
    assert_eq!(cut("abc def ghi jkl", 0.4).0, "abc def ghi \0");
    let expected = ("\u{20ac}\u{20ac}\u{20ac}\0".into(), "\u{20ac}\0".into());
    assert_eq!(cut("\u{20ac}\u{20ac}\u{20ac}\u{20ac}", 0.4), expected);
}

#[test]
fn of_many_documents_the_last_are_validation() {
    let files: Vec<(String, String)> = (0..10).map(|i| (format!("in/{i}.txt"), format!("text {i}\n"))).collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(name, contents)| (name.as_str(), contents.as_str())).collect();
    let (train, validation) = of_text(&files, &["in"], 0.2);
    assert_eq!(train.matches(END).count(), 8);
    assert_eq!(validation, "text 8\n\0text 9\n\0");
}

#[test]
fn records_are_read_whatever_their_form() {
    let texts = ["one\n\"two\"", "", "\u{e9}\u{1f600}", "four"];
    let json = lines(&texts);
    // A last line without an end, and one with nothing in it.
    let plain = format!("\n{}", json.trim_end());
    let rows: Vec<_> = texts.iter().map(|text| (Some(*text), "{}")).collect();
    let halves = json.split_at(json.find("four").unwrap() - 20);
    let frames = [zst(halves.0.as_bytes()), zst(halves.1.as_bytes())].concat();
    let members = [gz(halves.0.as_bytes()), gz(halves.1.as_bytes())].concat();
    let files = [
        ("train-a.jsonl", plain.into_bytes()),
        ("train-b.jsonl.gz", members),
        ("c/train/x.JSONL.zst", frames),
        ("train-d.parquet", parquet(&rows, 3)),
        ("val.json", lines(&["v"]).into_bytes()),
        ("x/dev/1.jsonl", lines(&["d"]).into_bytes()),
        ("test_0.jsonl.gz", gz(lines(&["t"]).as_bytes())),
        ("readme.txt", b"no".to_vec()),
    ];
    let dir = folder(&files);
    let expected = texts.map(|text| format!("{text}\0")).concat();
    for (name, _) in &files[..4] {
        let (train, validation, _) = prepared(options(&dir, Dataset::ArxivMath, &[name])).unwrap();
        assert_eq!((train, validation), (expected.clone(), String::new()), "{name}");
    }
    let (train, validation, test) = prepared(options(&dir, Dataset::ArxivMath, &["."])).unwrap();
    assert_eq!((train, validation, test), (expected.repeat(4), "v\0d\0".into(), Some("t\0".into())));
    let error = prepared(options(&folder(&[("a.jsonl", "")]), Dataset::ArxivMath, &["a.jsonl"])).unwrap_err();
    assert!(error.to_string().contains("neither train nor validation nor test"), "{error}");
    let error = prepared(options(&dir, Dataset::RedPajama, &["readme.txt"])).unwrap_err();
    assert!(matches!(error, Error::Layout { .. }));

    // Text, compressed or in a table.
    let files = [("a.txt.gz", gz(b"packed")), ("b.txt.zst", zst(b"tight")), ("c.parquet", parquet(&rows, 2))];
    let dir = folder(&files);
    let options = Options { val_fraction: Some(0.0), ..options(&dir, Dataset::Text, &["."]) };
    assert_eq!(prepared(options).unwrap().0, format!("packed\0tight\0{expected}"));
}

#[test]
fn records_of_other_parts_of_proof_pile_are_left_out() {
    let record =
        |meta: serde_json::Value, text: &str| serde_json::json!({"text": text, "meta": meta}).to_string() + "\n";
    let records = [
        record("{\"config\": \"arxiv\"}".into(), "a"),
        record("{\"config\": \"formal\"}".into(), "no"),
        record(serde_json::json!({"config": "books"}), "no"),
        record(serde_json::json!({"file": "x"}), "b"),
        record("not JSON".into(), "c"),
        record(serde_json::Value::Null, "d"),
    ];
    let rows = [
        (Some("a"), "{\"config\": \"arxiv\"}"),
        (Some("no"), "{\"config\": \"formal\"}"),
        (None, "{\"config\": \"x\"}"),
    ];
    let dir = folder(&[("train.jsonl", records.concat().into_bytes()), ("train.parquet", parquet(&rows, 2))]);
    let out = TempDir::new().unwrap();
    let done = prepare(options(&dir, Dataset::ArxivMath, &["train.jsonl", "train.parquet"]), out.path()).unwrap();
    assert_eq!((done.other_records, done.documents), (4, 5));
    assert_eq!(texts(out.path()).0, "a\0b\0c\0d\0a\0");
    // Another data set has its own meaning of `meta`.
    let done = prepare(options(&dir, Dataset::RedPajama, &["train.jsonl"]), out.path()).unwrap();
    assert_eq!((done.other_records, done.documents), (0, 6));
}

#[test]
fn equal_records_are_in_the_same_set() {
    let records: Vec<String> = (0..2000).map(|i| format!("record {i}")).collect();
    let mut records: Vec<&str> = records.iter().map(String::as_str).collect();
    let divided = |records: &[&str]| {
        let dir = folder(&[("a.jsonl", lines(&records[..700])), ("b.jsonl", lines(&records[700..]))]);
        let options = Options { val_fraction: Some(0.1), ..options(&dir, Dataset::RedPajama, &["a.jsonl", "b.jsonl"]) };
        let (_, validation, test) = prepared(options).unwrap();
        assert_eq!(test, None);
        let mut validation: Vec<String> = validation.split_terminator(END).map(str::to_owned).collect();
        validation.sort();
        validation
    };
    let validation = divided(&records);
    assert!((120..280).contains(&validation.len()), "{}", validation.len());
    records.reverse();
    assert_eq!(divided(&records), validation);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn no_text_is_lost(documents in prop::collection::vec("[a-z \n\u{e9}]{1,60}", 1..6), val_fraction in 0.0..0.99f64) {
        let names: Vec<String> = (0..documents.len()).map(|i| format!("in/{i}.txt")).collect();
        let files: Vec<(&str, &str)> =
            names.iter().zip(&documents).map(|(name, contents)| (name.as_str(), contents.as_str())).collect();
        let (train, validation) = of_text(&files, &["in"], val_fraction);
        prop_assert_eq!((train + &validation).replace(END, ""), documents.concat());
    }
}

#[test]
fn a_document_of_many_pieces_is_whole() {
    let book: String = (0..120_000).map(|i| format!("word{i} and ")).collect();
    assert!(book.len() > 1 << 20);
    assert_eq!(of_text(&[("b.txt", &book)], &["b.txt"], 0.0).0, book.clone() + "\0");
    let dir = folder(&[("train.jsonl", lines(&["x", &book, "y"]))]);
    assert_eq!(prepared(options(&dir, Dataset::ArxivMath, &["train.jsonl"])).unwrap().0, format!("x\0{book}\0y\0"));
}

#[test]
fn an_earlier_preparation_s_files_are_replaced() {
    let dir = folder(&[("pg/train/1.txt", "a"), ("pg/validation/2.txt", "b"), ("pg/test/3.txt", "c")]);
    let out = dir.path().join("out");
    prepare(options(&dir, Dataset::Pg19, &["pg"]), &out).unwrap();
    fs::remove_dir_all(dir.path().join("pg/test")).unwrap();
    fs::write(dir.path().join("pg/train/1.txt"), "d").unwrap();
    prepare(options(&dir, Dataset::Pg19, &["pg"]), &out).unwrap();
    assert_eq!(texts(&out), ("d\0".into(), "b\0".into(), None));
}

#[test]
fn a_folder_of_raw_files_opens_without_a_tokenizer() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("train.bin"), [1, 0, 2, 0]).unwrap();
    assert!(matches!(DataFolder::open(dir.path()), Err(Error::MissingFile { .. })));
    fs::write(dir.path().join("val.bin"), [3, 0]).unwrap();
    let data = DataFolder::open(dir.path()).unwrap();
    assert!(data.tokenizer.is_none() && data.test.is_none());
    assert_eq!((data.train.len(), Tokens::from(data.validation).get(0)), (2, Some(3)));
}

#[test]
fn a_folder_with_another_tokenizer_is_refused() {
    let dir = folder(&[("b.txt", "text")]);
    prepare(options(&dir, Dataset::Text, &["b.txt"]), dir.path()).unwrap();
    let json = include_str!("../tokenizer/bytes.tokenizer.json").replace("<|endoftext|>", "</s>");
    fs::write(dir.path().join("tokenizer.json"), json).unwrap();
    assert!(matches!(DataFolder::open(dir.path()), Err(Error::OtherTokenizer { .. })));
}
