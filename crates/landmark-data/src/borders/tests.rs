use proptest::prelude::*;

use super::*;
use crate::{Batches, IGNORE, Landmarks, Stream};

const BORDERS: [Border; 4] = [Border::Sentence, Border::Paragraph, Border::Line, Border::Code];
const LANDMARK: u32 = 257;
const END: u32 = 256;

/// Whether `text` ends with the end of a sentence, looking back from its end.
fn ends_sentence(text: &str) -> bool {
    let spaces = [' ', '\t', '\r', '\n'];
    let closed = text.trim_end_matches(spaces).trim_end_matches(['"', '\'', ')', ']', '\u{201d}', '\u{2019}']);
    match closed.chars().next_back() {
        Some('!' | '?' | '\u{2026}') => true,
        Some('.') => {
            let before = &closed[..closed.len() - 1];
            let begin = before.trim_end_matches(|c: char| c.is_alphanumeric() || "'\u{2019}".contains(c)).len();
            let mut word = before[begin..].trim_start_matches('\'');
            if !before[..begin].ends_with(spaces) && ends_sentence(&before[..begin]) {
                // The quote of the sentence before.
                word = word.trim_start_matches(['\'', '\u{2019}']);
            }
            let is_short = word.len() == 1 || word.len() <= 3 && word.starts_with(|c: char| c.is_ascii_uppercase());
            let abbreviates = !word.is_empty() && is_short && word.chars().all(|c| c.is_ascii_alphabetic());
            !abbreviates && !word.ends_with(|c: char| c.is_ascii_digit())
        }
        _ => false,
    }
}

fn ends_paragraph(text: &str) -> bool {
    text.strip_suffix('\n').is_some_and(|text| text.trim_end_matches([' ', '\t', '\r']).ends_with('\n'))
}

fn ends_item(text: &str) -> bool {
    let Some(text) = text.strip_suffix('\n') else { return false };
    let line = text.rsplit('\n').next().unwrap_or(text);
    // Before the first line there is nothing that could end.
    text.len() > line.len() && (line.trim_matches([' ', '\t', '\r']).is_empty() || line.starts_with(['}', ')', ']']))
}

/// The places of landmarks as the documentation has them: block sizes of one document of bytes.
fn naive(border: Border, text: &str, mem_freq: usize) -> Vec<usize> {
    let (mut blocks, mut size) = (Vec::new(), 0);
    for end in 1..=text.len() {
        size += 1;
        // Within a character there is no border.
        let before = text.is_char_boundary(end).then(|| &text[..end]);
        let is_border = before.is_some_and(|text| match border {
            Border::Sentence => ends_sentence(text),
            Border::Paragraph => ends_paragraph(text),
            Border::Line => text.ends_with('\n'),
            Border::Code => ends_item(text),
        });
        let is_weak = border == Border::Code && text.as_bytes()[end - 1] == b'\n';
        if size == mem_freq || is_border && 4 * size >= mem_freq || is_weak && 4 * size >= 3 * mem_freq {
            blocks.push(size);
            size = 0;
        }
    }
    blocks
}

/// Block sizes as the rule has them.
fn blocks(rule: &BorderRule, tokens: &[u32]) -> Vec<usize> {
    let mut placer = Placer::at_borders(rule.clone());
    let (mut blocks, mut size) = (Vec::new(), 0);
    for &token in tokens {
        size += 1;
        if placer.push(token) {
            blocks.push(std::mem::take(&mut size));
        }
    }
    blocks
}

fn bytes(border: Border, mem_freq: u32) -> BorderRule {
    BorderRule::new(border, &Tokenizer::bytes(), mem_freq).unwrap()
}

/// Text with all that matters to some border.
fn text() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "a",
        "Mr",
        "Tom",
        "Anna",
        "said",
        "can't",
        "can\u{2019}t",
        "3",
        "14",
        ".",
        "!",
        "?",
        "\u{2026}",
        "...",
        "\"",
        "\u{201c}",
        "\u{201d}",
        "'",
        ")",
        "]",
        "}",
        "{",
        "(",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\n\n",
        "\n    ",
        "\u{e9}t\u{e9}",
        ",",
        "\u{2014}",
    ]);
    prop::collection::vec(piece, 0..80).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn places_are_the_documented_ones(text in text(), mem_freq in 1u32..40, border in prop::sample::select(BORDERS.to_vec())) {
        let tokens = Tokenizer::bytes().encode(&text).unwrap();
        prop_assert_eq!(blocks(&bytes(border, mem_freq), &tokens), naive(border, &text, mem_freq as usize), "{:?}", text);
    }

    /// Tokens of many bytes: a border counts where it is at a token's end.
    #[test]
    fn long_tokens_are_their_bytes(text in text(), cuts in prop::collection::vec(1usize..6, 1..200), border in prop::sample::select(BORDERS.to_vec())) {
        let (mut texts, mut rest) = (Vec::new(), text.as_bytes());
        for cut in cuts {
            let (token, others) = rest.split_at(cut.min(rest.len()));
            texts.push(token.to_vec());
            rest = others;
        }
        // Tokens are all different; a block is never full, and ends at every border.
        let ids: Vec<u32> = (0..texts.len() as u32).collect();
        let rule = BorderRule::compile(border, &texts, None, 4).unwrap();
        let mut ends: Vec<usize> = vec![];
        let mut state = 0;
        for (i, token) in texts.iter().enumerate() {
            state = token.iter().fold(state, |state, &byte| automaton::next(border, state, byte));
            let since = i + 1 - ends.last().copied().unwrap_or(0);
            let enough = match automaton::strength(border, state) {
                Strength::Strong => 1,
                Strength::Weak => 3,
                Strength::None => 4,
            };
            if since >= enough {
                ends.push(i + 1);
            }
        }
        let mut sum = 0;
        let found: Vec<usize> = blocks(&rule, &ids).iter().map(|size| { sum += size; sum }).collect();
        prop_assert_eq!(found, ends);
    }

    /// No block is too long, none but a document's last too short, and none of two documents; a document's landmarks are the same wherever
    /// it stands in a corpus.
    #[test]
    fn documents_have_places_of_their_own(
        texts in prop::collection::vec(text(), 1..6), mem_freq in 1u32..40, border in prop::sample::select(BORDERS.to_vec()),
    ) {
        let rule = bytes(border, mem_freq);
        let (mut corpus, mut expected) = (Vec::new(), Vec::new());
        for text in &texts {
            let mut document = Tokenizer::bytes().encode(text).unwrap();
            document.push(END);
            expected.extend(blocks(&rule, &document));
            corpus.extend(document);
        }
        let found = blocks(&rule, &corpus);
        prop_assert_eq!(&found, &expected);
        let mut end = 0;
        for &size in &found {
            end += size;
            prop_assert!(size <= mem_freq as usize);
            prop_assert!(4 * size >= mem_freq as usize || corpus[end - 1] == END);
            prop_assert!(!corpus[end - size..end - 1].contains(&END));
        }
        prop_assert_eq!(end, corpus.len());
    }

    /// Batches: windows of the materialised stream with the authors' targets.
    #[test]
    fn batches_are_windows_of_the_corpus_with_its_landmarks(
        texts in prop::collection::vec(text(), 3..8), mem_freq in 1u32..40, window in 1usize..30, seed: u64, index: u64,
    ) {
        let rule = bytes(Border::Sentence, mem_freq);
        let tokenizer = Tokenizer::bytes();
        let mut corpus: Vec<u32> = vec![65; 40];
        for text in &texts {
            corpus.push(END);
            corpus.extend(tokenizer.encode(text).unwrap());
        }
        let mut placer = Placer::at_borders(rule.clone());
        let with_landmark = |&id: &u32| if placer.push(id) { vec![id, LANDMARK] } else { vec![id] };
        let all: Vec<u32> = corpus.iter().flat_map(with_landmark).collect();
        let stream = Stream::new(corpus, Landmarks::AtBorders { id: LANDMARK, rule }).unwrap();
        prop_assert_eq!(stream.read(0, all.len()).unwrap(), &all[..]);
        prop_assert_eq!(stream.len(), all.len() as u64);
        prop_assert_eq!(stream.get(all.len() as u64 / 2), Some(all[all.len() / 2]));
        let batches = Batches::new(stream, 3, window, Some(END)).unwrap();
        let batch = batches.batch(seed, index);
        prop_assert_eq!(&batch, &batches.batch(seed, index));
        let legal = |inputs: &[u32], targets: &[u32]| (0..all.len() - window - 1).any(|start| {
            all[start..start + window] == *inputs && (0..window).all(|i| {
                let (input, next) = (all[start + i], all[start + i + 1]);
                let target = if next == LANDMARK { all[start + i + 2] } else { next };
                targets[i] == if [LANDMARK, END].contains(&input) { IGNORE } else { target }
            })
        });
        for (inputs, targets) in batch.inputs.chunks(window).zip(batch.targets.chunks(window)) {
            prop_assert!(legal(inputs, targets), "{:?} {:?}", inputs, targets);
        }
    }
}

#[test]
fn a_regular_placer_counts() {
    let mut placer = Placer::every(3);
    let places: Vec<bool> = (0..8).map(|id| placer.push(id)).collect();
    assert_eq!(places, [false, false, true, false, false, true, false, false]);
    placer.clear();
    assert_eq!([placer.push(0), placer.push(0), placer.push(0)], [false, false, true]);
    assert!(placer.is_regular() && placer.mem_freq() == 3);
}

#[test]
fn bad_arguments_are_errors() {
    let empty_blocks = BorderRule::new(Border::Line, &Tokenizer::bytes(), 0);
    assert!(matches!(empty_blocks, Err(Error::Param { name: "mem_freq", .. })));
    assert_ne!(bytes(Border::Line, 4), bytes(Border::Code, 4));
    assert_ne!(bytes(Border::Line, 4), bytes(Border::Line, 5));
    assert_eq!(bytes(Border::Line, 4), bytes(Border::Line, 4));
}
