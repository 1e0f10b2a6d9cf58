//! The automata that find borders: what has been read so far is one of a few states, and each byte leads to the next.
//!
//! State 0 is the beginning of a text. They work on bytes, so that a token may end anywhere in a character.

use super::Border;

/// How good a place for a landmark is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strength {
    /// None: only a full block ends here.
    None,
    /// Better than no border, for a block that is nearly full.
    Weak,
    /// A border.
    Strong,
}

/// States of the largest automaton.
pub(super) fn states(border: Border) -> u8 {
    match border {
        Border::Sentence => sentence::STATES,
        Border::Paragraph => paragraph::STATES,
        Border::Line => line::STATES,
        Border::Code => code::STATES,
    }
}

/// The state after one more byte.
pub(super) fn next(border: Border, state: u8, byte: u8) -> u8 {
    match border {
        Border::Sentence => sentence::next(state, byte),
        Border::Paragraph => paragraph::next(state, byte),
        Border::Line => line::next(byte),
        Border::Code => code::next(state, byte),
    }
}

/// Whether a text in this state ends with a border.
pub(super) fn strength(border: Border, state: u8) -> Strength {
    let strong = match border {
        Border::Sentence => state == sentence::END || state == sentence::END_SPACE,
        Border::Paragraph => state == paragraph::AFTER_EMPTY,
        Border::Line => state == line::AFTER_LINE,
        Border::Code => state == code::AFTER_ITEM,
    };
    match border {
        _ if strong => Strength::Strong,
        Border::Code if state == code::AFTER_LINE => Strength::Weak,
        _ => Strength::None,
    }
}

/// The end of a sentence: `.`, `!`, `?`, an ellipsis or their CJK forms, and the quotes, brackets and spaces that follow.
mod sentence {
    /// Anything that matters no more.
    const TEXT: u8 = 0;
    /// A word of one, two or three letters that begins with a capital.
    const CAPITAL: u8 = 1;
    const CAPITAL_2: u8 = 2;
    const CAPITAL_3: u8 = 3;
    /// A word of one small letter.
    const LETTER: u8 = 4;
    /// Any other word.
    const WORD: u8 = 5;
    /// A number.
    const NUMBER: u8 = 6;
    /// After an end and white space: a quote opens the next sentence.
    pub const END_SPACE: u8 = 7;
    /// The beginnings of characters that matter, after a text and (odd) after an end.
    const C2: u8 = 8;
    const E2: u8 = 10;
    const E2_80: u8 = 12;
    const E3: u8 = 14;
    const E3_80: u8 = 16;
    const EF: u8 = 18;
    const EF_BC: u8 = 20;
    /// After an end and the marks that close it.
    pub const END: u8 = 22;
    pub const STATES: u8 = 23;

    pub fn next(state: u8, byte: u8) -> u8 {
        let ended = u8::from(state == END || state > C2 && state % 2 == 1);
        // A closing mark goes with the end before it.
        let close = |otherwise| if ended == 1 { END } else { otherwise };
        match (state & !1, byte) {
            (C2, 0xbb) => return close(TEXT), // >> as one character
            (E2, 0x80) => return E2_80 + ended,
            (E2_80, 0xa6) => return END,         // ellipsis
            (E2_80, 0x99) => return close(WORD), // ' which is an apostrophe too
            (E2_80, 0x9d) => return close(TEXT), // "
            (E2_80, 0x80..=0xbf) => return TEXT, // dashes and opening quotes
            (E3, 0x80) => return E3_80 + ended,
            (E3_80, 0x82) => return END,                // ideographic full stop
            (E3_80, 0x8d | 0x8f) => return close(TEXT), // corner brackets
            (EF, 0xbc) => return EF_BC + ended,
            (EF_BC, 0x81 | 0x9f) => return END, // full-width ! and ?
            _ => {}
        }
        match byte {
            b'!' | b'?' => END,
            // After a number, an initial or a title ("3.5", "J. S. Mill", "e.g.", "Mr. Darcy") it ends no sentence.
            b'.' => match state {
                CAPITAL..=LETTER | NUMBER => TEXT,
                _ => END,
            },
            b' ' | b'\t' | b'\r' | b'\n' if matches!(state, END | END_SPACE) => END_SPACE,
            b'"' | b')' | b']' => close(TEXT),
            b'\'' if (CAPITAL..=NUMBER).contains(&state) => WORD,
            b'\'' => close(TEXT),
            b'0'..=b'9' => NUMBER,
            b'A'..=b'Z' | b'a'..=b'z' => match state {
                CAPITAL => CAPITAL_2,
                CAPITAL_2 => CAPITAL_3,
                CAPITAL_3 | LETTER | WORD | NUMBER => WORD,
                _ if byte.is_ascii_uppercase() => CAPITAL,
                _ => LETTER,
            },
            0xc2 => C2 + ended,
            0xe2 => E2 + ended,
            0xe3 => E3 + ended,
            0xef => EF + ended,
            // Letters of other alphabets.
            0x80.. => WORD,
            _ => TEXT,
        }
    }
}

/// An empty line: a line end, then nothing but white space up to another one.
mod paragraph {
    const TEXT: u8 = 0;
    /// After the end of a line that is not empty, and the white space that follows.
    const AFTER_LINE: u8 = 1;
    pub const AFTER_EMPTY: u8 = 2;
    /// White space after an empty line: it belongs to what follows.
    const INDENT: u8 = 3;
    pub const STATES: u8 = 4;

    pub fn next(state: u8, byte: u8) -> u8 {
        match (state, byte) {
            (TEXT, b'\n') => AFTER_LINE,
            (_, b'\n') => AFTER_EMPTY,
            (AFTER_EMPTY, b' ' | b'\t' | b'\r') => INDENT,
            (_, b' ' | b'\t' | b'\r') => state,
            _ => TEXT,
        }
    }
}

/// The end of a line.
mod line {
    const TEXT: u8 = 0;
    pub const AFTER_LINE: u8 = 1;
    pub const STATES: u8 = 2;

    pub fn next(byte: u8) -> u8 {
        if byte == b'\n' { AFTER_LINE } else { TEXT }
    }
}

/// The end of an item of a program: an empty line, or a line that begins with a closing bracket at the left margin. Any other
/// line end is a weak border.
mod code {
    /// In a line.
    const TEXT: u8 = 0;
    pub const AFTER_LINE: u8 = 1;
    pub const AFTER_ITEM: u8 = 2;
    /// In the white space that a line begins with.
    const INDENT: u8 = 3;
    /// In a line that closes an item.
    const CLOSING: u8 = 4;
    pub const STATES: u8 = 5;

    pub fn next(state: u8, byte: u8) -> u8 {
        match (state, byte) {
            (TEXT, b'\n') => AFTER_LINE,
            (_, b'\n') => AFTER_ITEM,
            (AFTER_LINE | AFTER_ITEM | INDENT, b' ' | b'\t' | b'\r') => INDENT,
            (AFTER_LINE | AFTER_ITEM, b'}' | b')' | b']') => CLOSING,
            (CLOSING, _) => CLOSING,
            _ => TEXT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces of a text that its borders, of at least this strength, cut it into.
    fn pieces(border: Border, text: &str, weak: bool) -> Vec<String> {
        let (mut state, mut pieces, mut piece) = (0, Vec::new(), String::new());
        let after = |state, c: char| {
            c.encode_utf8(&mut [0; 4]).bytes().fold(state, |state, byte| {
                let next = next(border, state, byte);
                assert!(next < states(border));
                next
            })
        };
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            state = after(state, c);
            piece.push(c);
            let is_border = match strength(border, state) {
                Strength::Strong => true,
                Strength::Weak => weak,
                Strength::None => false,
            };
            // The last of several borders side by side.
            let goes_on = chars.peek().is_some_and(|&c| strength(border, after(state, c)) == strength(border, state));
            if is_border && !goes_on || chars.peek().is_none() {
                pieces.push(std::mem::take(&mut piece));
            }
        }
        pieces
    }

    fn check(border: Border, pieces_of_text: &[&str]) {
        assert_eq!(pieces(border, &pieces_of_text.concat(), false), pieces_of_text);
    }

    #[test]
    fn sentences_end_with_their_quotes_and_spaces() {
        check(
            Border::Sentence,
            &[
                "It was the best of times. ",
                "\"Was it?\" ",
                "Well (perhaps!) ",
                "it was... ",
                "He said “No, never.” ",
                "They can't. ",
                "They can\u{2019}t. ",
                "Un café. ",
                "\u{ab} Oui, madame.\u{bb} ",
                "Wait\u{2026} ",
                "\u{5929}\u{6c14}\u{597d}\u{3002}",
                "\u{597d}\u{ff01}",
                "The end.\n\n",
                "No more",
            ],
        );
    }

    #[test]
    fn titles_initials_and_numbers_end_no_sentence() {
        for text in
            ["Mr. Darcy and Mrs. Bennet met Dr. Who", "J. S. Mill, e.g. in i.e. 3.14 or in 1859. or so", "St. Ives"]
        {
            check(Border::Sentence, &[text]);
        }
        // But all else does, with a mark that cannot be taken for an abbreviation too.
        check(Border::Sentence, &["Was it Tom? ", "In 1859! ", "Said Thomas. ", "x"]);
    }

    #[test]
    fn other_marks_end_no_sentence() {
        check(
            Border::Sentence,
            &["One \u{2014} two \u{201c}three\u{201d} four\u{2019}s \u{e9}\u{bb} five; six: seven, \u{3001} \u{ff0c}"],
        );
    }

    #[test]
    fn paragraphs_end_with_an_empty_line() {
        check(Border::Paragraph, &["one\ntwo\n\n\n", "  three\r\n \t\r\n", "four\n five\n"]);
    }

    #[test]
    fn lines_end_with_a_line_end() {
        check(Border::Line, &["one\n", "  two\r\n\n", "three"]);
    }

    #[test]
    fn code_ends_at_empty_lines_and_closing_brackets_at_the_margin() {
        let items = ["fn a() {\n    if b {\n    }\n}\n", "use c;\n\n", "    d()\n", "]) + e\n", "f"];
        let text = items.concat();
        assert_eq!(pieces(Border::Code, &text, false), [items[0], items[1], &[items[2], items[3]].concat(), "f"]);
        assert_eq!(pieces(Border::Code, &text, true).len(), text.lines().count());
    }
}
