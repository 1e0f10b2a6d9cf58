//! Stop strings: the text ends before the first of them, and what may be the beginning of one is held back until it is known.

/// The end of a text on its way to a client.
pub struct Stops {
    stops: Vec<String>,
    held: String,
}

impl Stops {
    /// That ends before any of these, none of which is empty.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new() }
    }

    /// Takes the next piece: the text that may be shown, and whether it ends there.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(end) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(end);
            return (std::mem::take(&mut self.held), true);
        }
        // The longest end that begins a stop string.
        let begins = |from: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*from..]));
        let from = self.held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(from);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, when nothing follows.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut ends = Stops::new(&stops.iter().map(|&stop| stop.into()).collect::<Vec<String>>());
        let mut text = String::new();
        for piece in pieces {
            let (shown, stopped) = ends.push(piece);
            text += &shown;
            assert!(stopped || stops.iter().all(|stop| !text.contains(stop)));
            if stopped {
                return (text, true);
            }
        }
        (text + &ends.finish(), false)
    }

    #[test]
    fn a_text_ends_before_its_first_stop_string_however_it_comes() {
        let whole = "one. two.\n\nthree \u{e9}nd";
        for (stops, expected) in [
            (&["\n\n"][..], "one. two."),
            (&["three", "two"], "one. "),
            (&["\u{e9}n", "x"], "one. two.\n\nthree "),
            (&["o"], ""),
        ] {
            for size in 1..8 {
                let characters: Vec<char> = whole.chars().collect();
                let pieces: Vec<String> = characters.chunks(size).map(|piece| piece.iter().collect()).collect();
                let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
                assert_eq!(through(stops, &pieces), (expected.into(), true), "{stops:?} in pieces of {size}");
            }
        }
        assert_eq!(through(&["end of all"], &["the end of"]), ("the end of".into(), false));
        assert_eq!(through(&["aab"], &["aaa", "b"]), ("a".into(), true));
    }
}
