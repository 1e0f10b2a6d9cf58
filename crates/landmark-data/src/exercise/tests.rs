//! Exercises: what is planted, what weighs what, and that nothing but the numbers decides.

use std::collections::HashMap;

use super::fact::Fact;
use super::*;
use crate::{IGNORE, Landmarks, Stream};

const LANDMARK: u32 = 300;
const MEM_FREQ: u32 = 50;
const WINDOW: usize = 510;

/// Text without digits, so that a digit is a planted one.
fn corpus() -> Vec<u32> {
    let words = ["the", "rain", "fell", "in", "torrents", "night", "and", "a", "dark", "street", "wind", "lamp"];
    let text: String =
        (0..40_000u64).map(|i| format!("{} ", words[(i.wrapping_mul(0x9e37_79b9) >> 7) as usize % 12])).collect();
    text.bytes().map(u32::from).collect()
}

fn plain(rows: usize, window: usize) -> Batches {
    let stream = Stream::new(corpus(), Landmarks::Insert { id: LANDMARK, mem_freq: MEM_FREQ }).unwrap();
    Batches::new(stream, rows, window, Some(256)).unwrap().whole_blocks().unwrap()
}

fn exercises(rows: usize, options: ExerciseOptions) -> Exercises {
    Exercises::new(plain(rows, WINDOW), Tokenizer::bytes(), options).unwrap()
}

/// A position's input, its target if there is one, and its weight.
type Position = (u8, Option<u8>, f32);

/// The rows of a batch without their landmarks.
fn rows(batch: &Batch) -> Vec<Vec<Position>> {
    let weights = batch.weights.as_ref().unwrap();
    assert_eq!(
        (batch.inputs.len(), batch.targets.len(), weights.len()),
        (batch.rows * WINDOW, batch.rows * WINDOW, batch.rows * WINDOW)
    );
    (0..batch.rows)
        .map(|row| {
            let positions = (row * WINDOW..(row + 1) * WINDOW).filter_map(|i| {
                let is_landmark = (i - row * WINDOW) % (MEM_FREQ as usize + 1) == MEM_FREQ as usize;
                assert_eq!(batch.inputs[i] == LANDMARK, is_landmark);
                let target = batch.targets[i];
                assert_eq!(weights[i] == 0., target == IGNORE);
                let target = (target != IGNORE).then_some(target as u8);
                if is_landmark {
                    assert!(target.is_none())
                }
                (!is_landmark).then_some((batch.inputs[i] as u8, target, weights[i]))
            });
            positions.collect()
        })
        .collect()
}

#[test]
fn facts_are_told_before_they_are_asked_for_and_answers_weigh_more() {
    let exercises = exercises(8, ExerciseOptions { exercise_rows: 0.75, ..ExerciseOptions::default() });
    let (mut answers, mut several, mut pass_keys) = (0, 0, 0);
    for index in 0..50 {
        let batch = exercises.batch(3, index).unwrap();
        assert_eq!((batch.rows, batch.exercises), (8, 6));
        for (number, row) in rows(&batch).into_iter().enumerate() {
            let text: String = row.iter().map(|&(input, ..)| input as char).collect();
            // Targets are the next inputs.
            assert!(row.windows(2).all(|two| two[0].1.is_none_or(|target| target == two[1].0)), "{text}");
            if number >= 6 {
                assert!(row.iter().all(|&(_, target, weight)| target.is_some() && weight == 1.), "{text}");
                continue;
            }
            // Each run of targets that weigh more is " N.", and N was told before; told means a run of targets without a loss.
            let mut told: HashMap<String, usize> = HashMap::new();
            let (mut silent, mut answer, mut asked) = (String::new(), String::new(), 0);
            for (i, &(_, target, weight)) in row[..row.len() - 1].iter().enumerate() {
                let next = row[i + 1].0 as char;
                match target {
                    None => silent.push(next),
                    Some(_) if !silent.is_empty() => {
                        let number = std::mem::take(&mut silent);
                        assert!(number.trim().bytes().all(|b| b.is_ascii_digit()), "{number:?} in {text}");
                        told.insert(number.trim().to_string(), i);
                    }
                    _ => {}
                }
                if weight == 5. {
                    answer.push(next);
                } else {
                    assert!(weight <= 1., "{weight}");
                    if !answer.is_empty() {
                        let full = std::mem::take(&mut answer);
                        let number = full
                            .strip_prefix(' ')
                            .and_then(|rest| rest.strip_suffix('.'))
                            .unwrap_or_else(|| panic!("{full:?} in {text}"));
                        assert!(told.contains_key(number), "{number} of {told:?} in {text}");
                        assert!((1..=7).contains(&number.len()) && !number.starts_with('0'));
                        asked += 1;
                    }
                }
            }
            assert!((1..=5).contains(&told.len()), "{told:?} {text}");
            assert!((0..=5).contains(&asked), "{asked}");
            (answers, several, pass_keys) = (
                answers + asked,
                several + (told.len() > 1) as usize,
                pass_keys + text.contains("he pass key is") as usize,
            );
        }
    }
    // 300 exercises. The last answer of some reaches the window's end and is not counted.
    assert!((380..900).contains(&answers), "{answers}");
    assert!((60..150).contains(&several), "{several}");
    assert!((90..220).contains(&pass_keys), "{pass_keys}");
}

#[test]
fn a_batch_is_a_function_of_seed_and_number_whatever_the_threads() {
    let exercises = exercises(6, ExerciseOptions::default());
    let batch = |seed, index| exercises.batch(seed, index).unwrap();
    assert_eq!(batch(1, 7), batch(1, 7));
    assert_ne!(batch(1, 7), batch(1, 8));
    assert_ne!(batch(1, 7), batch(2, 7));
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| batch(1, 7)), batch(1, 7));
    }
    // Rows differ, and do not depend on how many there are.
    let inputs = batch(1, 7).inputs;
    assert_ne!(inputs[..WINDOW], inputs[WINDOW..2 * WINDOW]);
    let more = self::exercises(60, ExerciseOptions::default()).batch(1, 7).unwrap();
    assert_eq!(more.exercises, 30);
    assert_eq!(more.inputs[..3 * WINDOW], inputs[..3 * WINDOW]);
}

#[test]
fn planting_encodes_as_the_whole_text_is_encoded() {
    let gpt2 = Tokenizer::gpt2().unwrap();
    let words = Words::of(&gpt2);
    let stream = Stream::new(
        gpt2.encode(&"It was a dark and stormy night. ".repeat(200)).unwrap(),
        Landmarks::Insert { id: 50260, mem_freq: 50 },
    );
    let plain = Batches::new(stream.unwrap(), 2, WINDOW, None).unwrap().whole_blocks().unwrap();
    let exercises = Exercises::new(plain, gpt2.clone(), ExerciseOptions::default()).unwrap();
    let mut draw = Draw(ChaCha8Rng::seed_from_u64(5));
    for _ in 0..200 {
        for fact in Fact::several(3, &words, &mut draw) {
            for piece in [
                row::statement(&exercises, &mut draw, &fact).unwrap(),
                row::question(&exercises, &mut draw, &fact).unwrap(),
            ] {
                let text = gpt2.decode(&piece.ids).unwrap();
                assert_eq!(gpt2.encode(&text).unwrap(), piece.ids, "{text:?}");
                assert!(text.contains(&fact.value) && !text.contains(['{', '\0']), "{text:?}");
            }
        }
    }
}

#[test]
fn the_first_questions_are_near_and_later_ones_ever_farther() {
    let options =
        ExerciseOptions { exercise_rows: 1., asked_again: 1., several_facts: 0., ..ExerciseOptions::default() };
    let exercises = exercises(40, options);
    let (mut first, mut last, mut n) = (0, 0, 0);
    for index in 0..20 {
        for row in rows(&exercises.batch(1, index).unwrap()) {
            let starts: Vec<usize> = (1..row.len()).filter(|&i| row[i].2 == 5. && row[i - 1].2 != 5.).collect();
            if let [a, b, .., y, z] = starts[..] {
                (first, last, n) = (first + b - a, last + z - y, n + 1);
            }
        }
    }
    assert!(n > 100, "{n}");
    assert!(5 * first < 4 * last, "{first} {last} of {n}");
}

#[test]
fn settings_that_cannot_be_are_errors() {
    let default = ExerciseOptions::default();
    for (name, options) in [
        ("exercise_rows", ExerciseOptions { exercise_rows: 0., ..default }),
        ("exercise_rows", ExerciseOptions { exercise_rows: 1.1, ..default }),
        ("exercise_rows", ExerciseOptions { exercise_rows: 0.01, ..default }),
        ("answer_weight", ExerciseOptions { answer_weight: f64::NAN, ..default }),
        ("several_facts", ExerciseOptions { several_facts: -1., ..default }),
        ("asked_again", ExerciseOptions { asked_again: 2., ..default }),
    ] {
        let error = Exercises::new(plain(4, WINDOW), Tokenizer::bytes(), options).unwrap_err();
        assert!(matches!(error, Error::Param { name: found, .. } if found == name), "{error}");
    }
    let short = Exercises::new(plain(4, 102), Tokenizer::bytes(), default);
    assert!(matches!(short, Err(Error::ShortWindow { got: 101, .. })));
    let stream = Stream::new(corpus(), Landmarks::Insert { id: LANDMARK, mem_freq: MEM_FREQ }).unwrap();
    let anywhere = Batches::new(stream, 4, WINDOW, None).unwrap();
    assert!(matches!(
        Exercises::new(anywhere, Tokenizer::bytes(), default),
        Err(Error::Param { name: "exercise_rows", .. })
    ));
}

/// Windows that exercises just fit: no attempt may go on for ever.
#[test]
fn short_windows_have_simple_exercises() {
    let window = (102..600)
        .find(|&window| Exercises::new(plain(4, window), Tokenizer::bytes(), ExerciseOptions::default()).is_ok())
        .unwrap();
    let exercises = Exercises::new(plain(4, window), Tokenizer::bytes(), ExerciseOptions::default()).unwrap();
    for index in 0..200 {
        assert_eq!(exercises.batch(0, index).unwrap().inputs.len(), 4 * window);
    }
}
