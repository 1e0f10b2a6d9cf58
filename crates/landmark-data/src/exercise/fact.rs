//! Facts, and the words they are told and asked for in.

use super::Draw;
use crate::Tokenizer;

/// What may have a number.
const NOUNS: [&str; 48] = [
    "key", "code", "number", "word", "token", "secret", "signal", "cipher", "sum", "price", "ticket", "box", "door",
    "room", "page", "ship", "garden", "river", "lamp", "bridge", "castle", "harbour", "window", "letter", "table",
    "orchard", "cellar", "mirror", "tower", "anchor", "barrel", "candle", "engine", "forest", "island", "jewel",
    "kettle", "ladder", "market", "needle", "oven", "parcel", "quarry", "saddle", "train", "village", "wagon", "well",
];

/// Whose number it may be.
const PERSONS: [&str; 52] = [
    "Alice", "Anna", "Arthur", "Bob", "Boris", "Carol", "Clara", "Daniel", "Dave", "David", "Edith", "Edward", "Emma",
    "Erin", "Eve", "Frank", "George", "Grace", "Greta", "Helen", "Henry", "Irene", "Jack", "Jacob", "James", "Jane",
    "John", "Karen", "Laura", "Louis", "Lucy", "Mallory", "Martha", "Mary", "Nathan", "Nora", "Olga", "Oscar", "Peter",
    "Quentin", "Rosa", "Ruth", "Simon", "Sophie", "Teresa", "Thomas", "Ursula", "Victor", "Wanda", "Xavier", "Yvonne",
    "Zachary",
];

/// What persons have.
const POSSESSIONS: [&str; 6] = ["number", "number", "pass key", "key", "code", "ticket"];

/// `{X}` and `{x}` stand for the name of the fact, at the beginning and inside of a sentence, `{n}` for its value.
const STATEMENTS: [&str; 8] = [
    "{X} is {n}. Remember it. {n} is {x}.",
    "{X} is {n}. Remember it. {n} is {x}.",
    "{X} is {n}. Remember it. {n} is {x}.",
    "{X} is {n}.",
    "Keep this in mind: {x} is {n}.",
    "You will be asked for {x}. {X} is {n}.",
    "Note that {x} is {n}. Once more, {x} is {n}.",
    "{n} is {x}.",
];

/// A question ends where its answer begins.
const QUESTIONS: [&str; 7] = [
    "What is {x}? {X} is",
    "What is {x}? {X} is",
    "What is {x}? {X} is",
    "Which number is {x}? {X} is",
    "Question: what is {x}? Answer: {x} is",
    "Tell me {x}. {X} is",
    "{X} is",
];

/// What stands in front of some exercises.
const TASKS: [&str; 4] = [
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the \
     important information there.",
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the \
     important information there.",
    "A number is told somewhere below. Read on, and keep it: there will be a question about it.",
    "Somewhere in this text a fact is stated. Remember it.",
];

/// The words of a vocabulary that are one token: names that no list of ours has.
#[derive(Clone, Debug)]
pub(super) struct Words(Vec<String>);

impl Words {
    /// Those of lower-case letters that begin with a space; a tokenizer of bytes has none, and is left with our nouns.
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let word = |text: Vec<u8>| {
            let word = text.strip_prefix(b" ")?;
            let is_word = word.len() >= 4 && word.iter().all(u8::is_ascii_lowercase);
            is_word.then(|| String::from_utf8_lossy(word).into_owned())
        };
        let words: Vec<String> = tokenizer.texts().into_iter().filter_map(word).collect();
        Self(if words.len() < 100 { NOUNS.map(String::from).to_vec() } else { words })
    }

    /// One of them, or now and then one of our nouns, which may be several tokens.
    fn draw(&self, draw: &mut Draw) -> &str {
        if draw.chance(0.2) { draw.of(&NOUNS) } else { &self.0[draw.below(self.0.len())] }
    }
}

/// What a fact is about.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Thing(String),
    Possession(&'static str, &'static str),
}

/// A name and its number.
#[derive(Clone, Debug)]
pub(super) struct Fact {
    name: Name,
    pub value: String,
}

impl Fact {
    /// `n` facts with different names.
    pub(super) fn several(n: usize, words: &Words, draw: &mut Draw) -> Vec<Self> {
        // Facts of one kind: what the name does not share with the others is all that tells them apart.
        let (possession, noun) = (draw.of(&POSSESSIONS), if draw.chance(0.5) { "key" } else { draw.of(&NOUNS) });
        let kind = if n == 1 { 1. } else { draw.fraction() };
        let mut facts: Vec<Self> = Vec::with_capacity(n);
        while facts.len() < n {
            let name = match kind {
                ..0.25 => Name::Possession(draw.of(&PERSONS), possession),
                ..0.8 => Name::Thing(format!("{} {noun}", words.draw(draw))),
                _ => Self::name(words, draw),
            };
            if facts.iter().all(|fact| fact.name != name) {
                facts.push(Self { name, value: value(draw) });
            }
        }
        facts
    }

    fn name(words: &Words, draw: &mut Draw) -> Name {
        match draw.fraction() {
            ..0.5 => Name::Thing("pass key".into()),
            ..0.7 => Name::Possession(draw.of(&PERSONS), draw.of(&POSSESSIONS)),
            ..0.9 => Name::Thing(format!("{} {}", words.draw(draw), draw.of(&NOUNS))),
            _ => Name::Thing(format!("{} {}", words.draw(draw), words.draw(draw))),
        }
    }

    /// How a sentence calls it.
    fn phrase(&self, draw: &mut Draw) -> String {
        match &self.name {
            Name::Thing(thing) => format!("the {thing}"),
            Name::Possession(person, what) if draw.chance(0.7) => format!("{person}'s {what}"),
            Name::Possession(person, what) => format!("the {what} of {person}"),
        }
    }

    /// The sentence that tells it, with [`VALUE`] for the value.
    pub(super) fn statement(&self, draw: &mut Draw) -> String {
        self.sentence(draw, &STATEMENTS)
    }

    /// The question for it, up to the answer.
    pub(super) fn question(&self, draw: &mut Draw) -> String {
        self.sentence(draw, &QUESTIONS)
    }

    fn sentence(&self, draw: &mut Draw, sentences: &[&'static str]) -> String {
        let sentence = draw.of(sentences).replace("{n}", VALUE);
        let phrase = self.phrase(draw);
        let (first, rest) = phrase.split_at(1);
        sentence.replace("{x}", &phrase).replace("{X}", &(first.to_ascii_uppercase() + rest))
    }
}

/// Stands for a value in a sentence.
pub(super) const VALUE: &str = "\0";

/// The description of the task.
pub(super) fn task(draw: &mut Draw) -> &'static str {
    draw.of(&TASKS)
}

/// A number, mostly of five digits, without zeros in front.
fn value(draw: &mut Draw) -> String {
    let digits = match draw.fraction() {
        ..0.6 => 5,
        ..0.9 => 4 + draw.below(4),
        _ => 1 + draw.below(3),
    };
    let digit = |i| if i == 0 { 1 + draw.below(9) } else { draw.below(10) };
    (0..digits).map(digit).map(|digit| (b'0' + digit as u8) as char).collect()
}

/// A text at least as long as any statement and any question for one fact.
pub(super) fn longest(words: &Words) -> String {
    let longest =
        |texts: &[&str]| texts.iter().max_by_key(|text| text.len()).map_or(String::new(), |text| text.to_string());
    let word = words.0.iter().max_by_key(|word| word.len()).map_or("", String::as_str);
    let name = format!("the {word} {word}");
    let text = format!("\n{}\n\n\n{} {{n}}.", longest(&STATEMENTS), longest(&QUESTIONS));
    text.replace("{x}", &name).replace("{X}", &name).replace("{n}", "1234567")
}
