use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{DataFolder, TokenFile, Tokens};

const END: char = '\u{0}';

/// A file's text, with each end-of-text shown as `END`.
fn text(file: &TokenFile) -> String {
    let ids: Vec<u32> = (0..file.len()).filter_map(|i| file.get(i)).collect();
    let bytes = ids.iter().map(|&id| if id == 256 { END as u8 } else { id as u8 }).collect();
    String::from_utf8(bytes).unwrap()
}

/// Makes the files `(name, contents)`, prepares the `inputs` among them, returns both sets.
fn prepared(files: &[(&str, &str)], inputs: &[&str], val_fraction: f64) -> Result<(String, String)> {
    let dir = TempDir::new().unwrap();
    for (name, contents) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }
    let inputs: Vec<PathBuf> = inputs.iter().map(|input| dir.path().join(input)).collect();
    let out = dir.path().join("deep/out");
    let mut last = Progress::default();
    let summary = prepare_text(&inputs, &Tokenizer::bytes(), &out, val_fraction, |progress| last = *progress)?;
    let data = DataFolder::open(&out)?;
    assert_eq!(data.tokenizer.unwrap().fingerprint(), Tokenizer::bytes().fingerprint());
    assert_eq!(summary, last);
    assert_eq!(summary.bytes_done, summary.bytes_total);
    assert_eq!((summary.train_tokens, summary.validation_tokens), (data.train.len(), data.validation.len()));
    assert_eq!(summary.documents, data.train.documents() + data.validation.documents());
    // Nothing temporary is left.
    assert_eq!(fs::read_dir(&out).unwrap().count(), 3);
    Ok((text(&data.train), text(&data.validation)))
}

#[test]
fn folders_are_read_in_order_and_files_as_given() {
    let files = [
        ("in/b.txt", "B"),
        ("in/a.txt", "A"),
        ("in/sub/c.txt", "C"),
        ("in/notes.md", "no"),
        ("in/.hidden.txt", "no"),
        ("x.md", "X"),
    ];
    let (train, validation) = prepared(&files, &["x.md", "in"], 0.0).unwrap();
    assert_eq!((train.as_str(), validation.as_str()), ("X\0A\0B\0C\0", ""));
}

#[test]
fn the_layout_of_pg19_keeps_its_division() {
    let files = [
        ("pg/train/1.txt", "one"),
        ("pg/train/2.txt", "two"),
        ("pg/validation/3.txt", "three"),
        ("pg/test/4.txt", "4"),
    ];
    let (train, validation) = prepared(&files, &["pg"], 0.5).unwrap();
    assert_eq!((train.as_str(), validation.as_str()), ("one\0two\0", "three\0"));
}

#[test]
fn one_book_is_cut_at_the_end_of_a_line() {
    let book = "line one\nline two\nline three\nline four\n";
    let (train, validation) = prepared(&[("b.txt", book)], &["b.txt"], 0.5).unwrap();
    assert_eq!((train.as_str(), validation.as_str()), ("line one\nline two\nline three\n\0", "line four\n\0"));
    // A place that is already one is kept; text without lines is cut at a space, or between characters.
    let (train, _) = prepared(&[("b.txt", "abcd\nefgh\n")], &["b.txt"], 0.5).unwrap();
    assert_eq!(train, "abcd\n\0");
    let (train, _) = prepared(&[("b.txt", "abc def ghi jkl")], &["b.txt"], 0.4).unwrap();
    assert_eq!(train, "abc def ghi \0");
    let (train, validation) = prepared(&[("b.txt", "\u{20ac}\u{20ac}\u{20ac}\u{20ac}")], &["b.txt"], 0.4).unwrap();
    assert_eq!((train.as_str(), validation.as_str()), ("\u{20ac}\u{20ac}\u{20ac}\0", "\u{20ac}\0"));
}

#[test]
fn of_many_documents_the_last_are_validation() {
    let files: Vec<(String, String)> = (0..10).map(|i| (format!("in/{i}.txt"), format!("text {i}\n"))).collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(name, contents)| (name.as_str(), contents.as_str())).collect();
    let (train, validation) = prepared(&files, &["in"], 0.2).unwrap();
    assert_eq!(train.matches(END).count(), 8);
    assert_eq!(validation, "text 8\n\0text 9\n\0");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn no_text_is_lost(documents in prop::collection::vec("[a-z \n\u{e9}]{0,60}", 1..6), val_fraction in 0.0..0.99f64) {
        let names: Vec<String> = (0..documents.len()).map(|i| format!("in/{i}.txt")).collect();
        let files: Vec<(&str, &str)> =
            names.iter().zip(&documents).map(|(name, contents)| (name.as_str(), contents.as_str())).collect();
        match prepared(&files, &["in"], val_fraction) {
            Ok((train, validation)) => prop_assert_eq!((train + &validation).replace(END, ""), documents.concat()),
            Err(error) => {
                let no_text = matches!(error, Error::NoText { .. });
                prop_assert!(no_text && documents.concat().is_empty(), "{}", error);
            }
        }
    }
}

#[test]
fn a_document_of_many_pieces_is_whole() {
    let book: String = (0..120_000).map(|i| format!("word{i} and ")).collect();
    assert!(book.len() > 1 << 20);
    let (train, _) = prepared(&[("b.txt", &book)], &["b.txt"], 0.0).unwrap();
    assert_eq!(train, book + "\0");
}

#[test]
fn bad_inputs_are_errors_and_leave_nothing() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("bad.txt");
    let out = dir.path().join("out");
    fs::write(&path, b"fine\n\xff\n").unwrap();
    let prepare = |path: &Path, fraction| prepare_text(&[path.into()], &Tokenizer::bytes(), &out, fraction, |_| {});
    assert!(matches!(prepare(&path, 0.0), Err(Error::InvalidUtf8 { line: 2, offset: 5, .. })));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    assert!(matches!(DataFolder::open(&out), Err(Error::MissingFile { .. })));

    for fraction in [-0.1, 1.0, f64::NAN] {
        assert!(matches!(prepare(&path, fraction), Err(Error::Param { name: "val_fraction", .. })));
    }
    assert!(matches!(prepare(&dir.path().join("none"), 0.0), Err(Error::Io { .. })));
    assert!(matches!(prepare(&out, 0.0), Err(Error::NoText { .. })));
}

#[test]
fn a_folder_of_raw_files_opens_without_a_tokenizer() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("train.bin"), [1, 0, 2, 0]).unwrap();
    assert!(matches!(DataFolder::open(dir.path()), Err(Error::MissingFile { .. })));
    fs::write(dir.path().join("val.bin"), [3, 0]).unwrap();
    let data = DataFolder::open(dir.path()).unwrap();
    assert!(data.tokenizer.is_none());
    assert_eq!((data.train.len(), Tokens::from(data.validation).get(0)), (2, Some(3)));
}

#[test]
fn a_folder_with_another_tokenizer_is_refused() {
    let dir = TempDir::new().unwrap();
    let book = dir.path().join("b.txt");
    fs::write(&book, "text").unwrap();
    prepare_text(&[book], &Tokenizer::bytes(), dir.path(), 0.0, |_| {}).unwrap();
    let json = include_str!("../tokenizer/bytes.tokenizer.json").replace("<|endoftext|>", "</s>");
    fs::write(dir.path().join("tokenizer.json"), json).unwrap();
    assert!(matches!(DataFolder::open(dir.path()), Err(Error::OtherTokenizer { .. })));
}
