//! Facts that are told once in a long text.

use anyhow::bail;
use landmark_data::Tokenizer;
use std::ops::Range;

/// How far after its place a fact may be told, to stand between two lines.
const NEXT_LINE: usize = 2000;

/// What is told once, and asked for at the end.
pub struct Fact {
    /// Where it is told, as a share of the text.
    pub depth: f64,
    /// The words.
    pub told: String,
    /// The question, up to the answer.
    pub question: String,
    /// The answer.
    pub number: u64,
    /// The tokens of the text that tell it.
    pub at: Range<usize>,
}

impl Fact {
    /// Not told yet.
    pub fn new(depth: f64, told: String, question: &str, number: u64) -> Self {
        Self { depth, told, question: question.into(), number, at: 0..0 }
    }
}

/// `length` tokens of a text, again from its start at its end, with the facts told in it, between two lines where there are lines.
pub fn hide(text: &[u32], length: usize, facts: &mut [Fact], tokenizer: &Tokenizer) -> anyhow::Result<Vec<u32>> {
    if text.is_empty() {
        bail!("the text is empty");
    }
    let told = facts.iter().map(|fact| tokenizer.encode(&fact.told)).collect::<Result<Vec<_>, _>>()?;
    let Some(around) = length.checked_sub(told.iter().map(Vec::len).sum()) else {
        bail!("--tokens {length}: too short for what is told in it");
    };
    let ends_line = |i: usize| tokenizer.decode(&text[i % text.len()..][..1]).is_ok_and(|text| text.ends_with('\n'));
    let (mut tokens, mut done) = (Vec::with_capacity(length), 0);
    let stretch = |from: usize, to: usize| text.iter().copied().cycle().skip(from % text.len()).take(to - from);
    let mut order: Vec<usize> = (0..facts.len()).collect();
    order.sort_by(|&a, &b| facts[a].depth.total_cmp(&facts[b].depth));
    for i in order {
        let (fact, told) = (&mut facts[i], &told[i]);
        let wanted = ((fact.depth * around as f64) as usize).max(done);
        let last = around.min(wanted + NEXT_LINE);
        let place = (wanted..last).find(|&i| i > 0 && ends_line(i - 1) && !ends_line(i)).unwrap_or(wanted);
        tokens.extend(stretch(done, place));
        fact.at = tokens.len()..tokens.len() + told.len();
        tokens.extend(told);
        done = place;
    }
    tokens.extend(stretch(done, around));
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_told_between_lines_and_the_text_goes_on() {
        let tokenizer = Tokenizer::bytes();
        let text: String = (0..50).map(|i| format!("This is line {i}.\n\n")).collect();
        let tokens = tokenizer.encode(&text).unwrap();
        for length in [300, 900, 5000] {
            let mut facts =
                [(0.7, "\nB is 2.\n"), (0.1, "\nA is 1.\n")].map(|(depth, told)| Fact::new(depth, told.into(), "", 0));
            let hidden = hide(&tokens, length, &mut facts, &tokenizer).unwrap();
            assert_eq!(hidden.len(), length);
            let mut rest = hidden.clone();
            for fact in &facts {
                assert_eq!(tokenizer.decode(&hidden[fact.at.clone()]).unwrap(), fact.told);
                assert_eq!(hidden[fact.at.start - 1], u32::from(b'\n'));
                let share = fact.at.start as f64 / length as f64;
                assert!((share - fact.depth).abs() < 0.1, "{share}");
                rest.drain(fact.at.clone());
            }
            assert!(text.repeat(6).starts_with(&tokenizer.decode(&rest).unwrap()));
        }
        let mut facts = [Fact::new(0.5, "\nA is 1.\n".into(), "", 0)];
        assert!(hide(&tokens, 5, &mut facts, &tokenizer).unwrap_err().to_string().starts_with("--tokens 5: too short"));
        assert!(hide(&[], 500, &mut facts, &tokenizer).is_err());
    }
}
