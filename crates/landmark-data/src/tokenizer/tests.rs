//! Both kinds of tokenizer, what they save, and those that are built in or trained.

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;

/// The byte tokenizer's file, loaded as any other one: what the `tokenizers` library makes of it.
fn bytes_as_hugging_face() -> Tokenizer {
    let mut json: Value = serde_json::from_str(byte_level::TOKENIZER_JSON).unwrap();
    // A difference that has no effect, so that it is not recognised.
    json["model"]["fuse_unk"] = true.into();
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}

/// A vocabulary of the SentencePiece kind: a mark for a space, bytes as `<0xC3>`.
fn sentence_piece() -> Tokenizer {
    let vocab = json!({ "<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "b": 4, "</s>": 5, "<0xC3>": 6, "<0xA9>": 7, "<0xE2>": 8,
        "<0x82>": 9, "<0xAC>": 10 });
    let special = json!({ "id": 5, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true });
    let json = json!({
        "version": "1.0", "truncation": { "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0 },
        "padding": null, "added_tokens": [special], "pre_tokenizer": null, "post_processor": null,
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" } ] },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["▁", "a"]] },
    });
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}

/// Decodes one id at a time; each piece is a `String`, so complete UTF-8 by type.
fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut decoder = tokenizer.decoder();
    let mut pieces: Vec<String> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
    pieces.push(decoder.finish().unwrap());
    pieces
}

proptest! {
    #[test]
    fn bytes_round_trip(text: String) {
        let tokenizer = Tokenizer::bytes();
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert!(ids.iter().copied().eq(text.bytes().map(u32::from)));
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }

    #[test]
    fn the_saved_byte_tokenizer_gives_byte_ids_in_the_tokenizers_library(text: String) {
        let library = tokenizers::Tokenizer::from_bytes(byte_level::TOKENIZER_JSON).unwrap();
        let ids = Tokenizer::bytes().encode(&text).unwrap();
        let theirs = library.encode(text.as_str(), true).unwrap();
        prop_assert_eq!(theirs.get_ids(), &ids);
        prop_assert_eq!(library.decode(&ids, true).unwrap(), text);
    }

    #[test]
    fn streaming_equals_decoding_at_once(ids in prop::collection::vec(0u32..258, 0..60)) {
        // Mostly not UTF-8 at all: replaced in the same places, and both kinds agree.
        for tokenizer in [Tokenizer::bytes(), bytes_as_hugging_face()] {
            prop_assert_eq!(stream(&tokenizer, &ids).concat(), Tokenizer::bytes().decode(&ids).unwrap());
            prop_assert_eq!(tokenizer.decode(&ids).unwrap(), Tokenizer::bytes().decode(&ids).unwrap());
        }
    }

    #[test]
    fn streaming_of_a_sentence_piece_vocabulary(text in "[ab \u{e9}\u{20ac}]{0,40}") {
        let tokenizer = sentence_piece();
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text.clone());
        let pieces = stream(&tokenizer, &ids);
        prop_assert!(!pieces.concat().contains(char::REPLACEMENT_CHARACTER));
        prop_assert_eq!(pieces.concat(), text);
    }
}

#[test]
fn characters_appear_when_they_are_complete() {
    let expected = ["a", "", "", "\u{20ac}", "", "\u{e9}", ""].map(String::from);
    assert_eq!(stream(&Tokenizer::bytes(), &[97, 0xe2, 0x82, 0xac, 0xc3, 0xa9]), expected);
    assert_eq!(stream(&sentence_piece(), &[2, 8, 9, 10, 6, 7]), expected);
    // Special ids give nothing, and do not break a character that they stand in.
    assert_eq!(stream(&Tokenizer::bytes(), &[0xc3, 257, 0xa9, 256]).concat(), "\u{e9}");
    // What can never become a character does not hold the rest back for ever.
    let pieces = stream(&sentence_piece(), &[6; 20]);
    assert!(!pieces[7].is_empty() && pieces.concat().chars().all(|c| c == char::REPLACEMENT_CHARACTER));
    assert_eq!(stream(&Tokenizer::bytes(), &[97, 0xe2, 0x82]), ["a", "", "", "\u{fffd}"].map(String::from));
}

#[test]
fn special_ids() {
    let bytes = Tokenizer::bytes();
    assert_eq!((bytes.vocab_size(), bytes.end_of_text(), bytes.landmark_id()), (258, Some(256), Some(257)));
    let hf = bytes_as_hugging_face();
    assert_eq!((hf.vocab_size(), hf.end_of_text(), hf.landmark_id()), (258, Some(256), Some(257)));
    let sp = sentence_piece();
    assert_eq!((sp.vocab_size(), sp.end_of_text(), sp.landmark_id()), (11, Some(5), None));
    for tokenizer in [&bytes, &hf] {
        assert_eq!(tokenizer.token_id("<landmark>"), Some(257));
        assert_eq!(tokenizer.token_id("A"), Some(65));
        assert_eq!(tokenizer.token_id("no such token"), None);
    }
}

#[test]
fn text_cannot_forge_special_ids_unless_it_is_asked_to() {
    let text = "é<landmark>b<|endoftext|>";
    for tokenizer in [Tokenizer::bytes(), bytes_as_hugging_face()] {
        let ids = tokenizer.encode(text).unwrap();
        assert!(ids.iter().all(|&id| id < 256) && ids.len() == text.len());
        assert_eq!(tokenizer.encode_batch(&[text.into(), "x".into()]).unwrap(), [ids, vec![120]]);
        assert_eq!(tokenizer.encode_with_special(text).unwrap(), [0xc3, 0xa9, 257, 98, 256]);
        assert_eq!(tokenizer.decode(&[0xc3, 0xa9, 257, 98, 256]).unwrap(), "éb");
    }
}

#[test]
fn a_file_s_truncation_is_not_applied() {
    assert_eq!(sentence_piece().encode("a a a a a a").unwrap(), [3; 6]);
}

#[test]
fn ids_outside_the_vocabulary_are_errors() {
    for tokenizer in [Tokenizer::bytes(), bytes_as_hugging_face()] {
        assert!(matches!(tokenizer.decode(&[1, 258]), Err(Error::UnknownToken { id: 258, vocab_size: 258 })));
        assert!(matches!(tokenizer.decoder().push(258), Err(Error::UnknownToken { .. })));
    }
}

#[test]
fn saved_and_loaded_it_is_the_same() {
    let dir = TempDir::new().unwrap();
    for tokenizer in [Tokenizer::bytes(), bytes_as_hugging_face(), sentence_piece()] {
        tokenizer.save(dir.path()).unwrap();
        let loaded = Tokenizer::from_file(dir.path().join(TOKENIZER_FILE)).unwrap();
        assert_eq!(loaded.fingerprint(), tokenizer.fingerprint());
        assert!(matches!(
            (&loaded.kind, &tokenizer.kind),
            (Kind::Bytes, Kind::Bytes) | (Kind::HuggingFace(_), Kind::HuggingFace(_))
        ));
    }
    assert_ne!(Tokenizer::bytes().fingerprint(), bytes_as_hugging_face().fingerprint());
    // Recorded: token files in the world carry it.
    assert_eq!(Tokenizer::bytes().fingerprint().to_string(), "7c237349205b854f");
}

#[test]
fn a_reformatted_byte_tokenizer_is_recognised() {
    let value: Value = serde_json::from_str(byte_level::TOKENIZER_JSON).unwrap();
    let loaded = Tokenizer::from_json(value.to_string().as_bytes()).unwrap();
    assert!(matches!(loaded.kind, Kind::Bytes));
    assert_eq!(loaded.fingerprint(), Tokenizer::bytes().fingerprint());
}

#[test]
fn files_that_are_no_tokenizer_are_errors() {
    for contents in ["", "{", "[]", "{\"version\": \"1.0\"}", "\u{0}"] {
        let error = Tokenizer::from_json(contents.as_bytes());
        assert!(matches!(error, Err(Error::TokenizerFile { .. })), "{contents}: {error:?}");
    }
    assert!(matches!(Tokenizer::from_file("/no/such/tokenizer.json"), Err(Error::Io { .. })));
}

/// The library panics where a token is shorter than what its decoder takes away.
#[test]
fn a_decoder_that_takes_away_too_much_is_an_error() {
    let mut json: Value = serde_json::from_slice(&sentence_piece().json).unwrap();
    json["decoder"] = json!({ "type": "Strip", "content": "a", "start": 0, "stop": 2 });
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    assert!(matches!(tokenizer.decode(&[2]), Err(Error::Tokenizer { operation: "decode", .. })));
    assert_eq!(tokenizer.decode(&[4]).unwrap(), "b");
}

#[test]
fn texts_are_what_ids_add_to_a_text() {
    let texts = Tokenizer::bytes().texts();
    assert_eq!((&texts[65][..], &texts[256][..], texts.len()), (&b"A"[..], &b""[..], 258));
    assert_eq!(bytes_as_hugging_face().texts(), texts);
    let texts = sentence_piece().texts();
    let texts: Vec<_> = texts.iter().map(|text| String::from_utf8_lossy(text)).collect();
    assert_eq!(&texts[1..6], [" ", "a", " a", "b", ""]);
}

#[test]
fn gpt2_is_built_in() {
    let gpt2 = Tokenizer::gpt2().unwrap();
    assert_eq!((gpt2.vocab_size(), gpt2.end_of_text(), gpt2.landmark_id()), (50257, Some(50256), None));
    // As OpenAI's encoder gives them.
    let ids = gpt2.encode("Hello, world! It's 2023.\n\n  \u{e9}\u{1f600}<|endoftext|>").unwrap();
    let expected =
        [15496, 11, 995, 0, 632, 338, 1160, 1954, 13, 628, 220, 38251, 47249, 222, 27, 91, 437, 1659, 5239, 91, 29];
    assert_eq!(ids, expected);
    // The length of the file that is distributed with the model.
    assert_eq!(gpt2.json.len(), 1_355_256);
    assert_eq!(Tokenizer::named("gpt2").unwrap().fingerprint(), gpt2.fingerprint());
    assert_eq!(Tokenizer::named("bytes").unwrap().fingerprint(), Tokenizer::bytes().fingerprint());
    assert!(matches!(Tokenizer::named("gpt3"), Err(Error::Io { .. })));
}

/// The ids that the library gives for the whole text.
fn library(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let Kind::HuggingFace(hf) = &tokenizer.kind else { panic!("not the library's") };
    assert!(hf.words.is_some());
    encode_one(&hf.ordinary, text).unwrap()
}

#[test]
fn words_give_the_ids_of_the_library() {
    let gpt2 = Tokenizer::gpt2().unwrap();
    proptest!(|(text in "([a-z]{1,9}|[ \n]{1,3}|[0-9.,'!?-]|'(s|re)|\\PC){0,40}")| {
        // Twice, so that the second time they come from the cache.
        for _ in 0..2 {
            prop_assert_eq!(gpt2.encode(&text).unwrap(), library(&gpt2, &text));
        }
    });
}

#[test]
fn only_a_tokenizer_of_words_is_taken_for_one() {
    let gpt2 = Tokenizer::gpt2().unwrap();
    let json: Value = serde_json::from_slice(&gpt2.json).unwrap();
    let words = |change: &dyn Fn(&mut Value)| {
        let mut json = json.clone();
        change(&mut json);
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
        let Kind::HuggingFace(hf) = &tokenizer.kind else { panic!("not the library's") };
        hf.words.is_some()
    };
    assert!(words(&|_| {}));
    assert!(!words(&|json| json["pre_tokenizer"]["add_prefix_space"] = true.into()));
    assert!(!words(&|json| json["pre_tokenizer"]["use_regex"] = false.into()));
    assert!(!words(&|json| json["normalizer"] = json!({ "type": "NFC" })));
    assert!(!words(&|json| json["added_tokens"][0]["special"] = false.into()));
    assert!(!words(&|json| json["model"]["dropout"] = 0.1.into()));
    assert!(!words(&|json| json["pre_tokenizer"] = Value::Null));
}

#[test]
fn digits_are_split_where_the_file_says_so() {
    let text = "In 1984 and 1985 the number was 48213, x\u{b2} and 7 7. ".repeat(9);
    let train = |split| {
        let mut training = BpeTraining::new(300).unwrap().split_digits(split);
        training.add(&[&text]);
        training.finish().unwrap()
    };
    let (single, together) = (train(true), train(false));
    assert!(together.encode(" 1984").unwrap().len() < 5);
    let pieces =
        |text| single.encode(text).unwrap().iter().map(|&id| single.decode(&[id]).unwrap()).collect::<Vec<_>>();
    assert_eq!(pieces(" 48213."), [" ", "4", "8", "2", "1", "3", "."]);
    assert_eq!(single.encode(&text).unwrap(), library(&single, &text));
    assert_eq!(single.decode(&single.encode(&text).unwrap()).unwrap(), text);
    proptest!(|(text in "([a-z]{1,9}|[ \n]{1,3}|[0-9\u{b2}\u{bd}\u{664}]{0,3}|[.,'!?-]|'(s|re)|\\PC){0,40}")| {
        for _ in 0..2 {
            prop_assert_eq!(single.encode(&text).unwrap(), library(&single, &text));
        }
    });
    let digits = |change: &dyn Fn(&mut Value)| {
        let mut json: Value = serde_json::from_slice(&single.json).unwrap();
        change(&mut json["pre_tokenizer"]["pretokenizers"]);
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
        let Kind::HuggingFace(hf) = &tokenizer.kind else { panic!("not the library's") };
        hf.words.is_some()
    };
    assert!(digits(&|_| {}));
    assert!(!digits(&|steps| steps[0]["individual_digits"] = false.into()));
    assert!(!digits(&|steps| steps[1]["use_regex"] = false.into()));
    assert!(!digits(&|steps| steps.as_array_mut().unwrap().reverse()));
}

fn trained(entries: usize, texts: &[&str]) -> Tokenizer {
    let mut training = BpeTraining::new(entries).unwrap();
    for batch in texts.chunks(2) {
        assert!(training.add(batch));
    }
    training.finish().unwrap()
}

#[test]
fn a_trained_tokenizer_merges_what_is_frequent() {
    let text = "the cat sat on the mat and the dog sat on the log. ".repeat(20);
    let tokenizer = trained(270, &[&text, "Then the other.", &text]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_text(), tokenizer.landmark_id()), (270, Some(268), Some(269)));
    assert!(tokenizer.is_byte_level());
    assert_eq!(tokenizer.encode(" the").unwrap().len(), 1);
    // Also of what it has never seen.
    let other = "\u{e9}\u{1f600} <landmark>\n";
    let ids = tokenizer.encode(other).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), other);
    assert!(ids.iter().all(|&id| id < 268));
    assert_eq!(ids, library(&tokenizer, other));
    assert_eq!(tokenizer.encode_with_special("<landmark><|endoftext|>").unwrap(), [269, 268]);

    // The same again, and another one for another text; no more entries than there are merges.
    assert_eq!(trained(270, &[&text, "Then the other.", &text]).fingerprint(), tokenizer.fingerprint());
    assert_ne!(trained(270, &[&text.replace("cat", "rat")]).fingerprint(), tokenizer.fingerprint());
    assert_eq!(trained(10_000, &["ab ab"]).vocab_size(), 259);
    assert_eq!(trained(258, &[&text]).vocab_size(), 258);
}
