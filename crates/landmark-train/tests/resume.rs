//! The same seed makes the same weights, and so does a run that was stopped and resumed.

use candle_core::Device;
use landmark_data::{ExerciseOptions, Tokenizer};
use landmark_models::gpt::{Gpt, GptConfig, NegativeRows, Placement, PositionalEncoder, Variant};
use landmark_train::{
    Corpus, Data, Error, Event, Limits, Method, Outcome, Process, Resume, Settings, checkpoint, train,
};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Every kind of randomness that training has.
fn settings() -> Settings {
    let model = GptConfig {
        vocab_size: 258,
        landmark_id: 257,
        n_embd: 32,
        n_head: 2,
        n_layer: 2,
        sequence_length: 40,
        mem_freq: Some(9),
        dropout: 0.1,
        group_dropout: Some(0.1),
        positional_encoder: PositionalEncoder::RotaryMemJump,
        pos_jump_on_mem: Some(5),
        bias: true,
        ..GptConfig::default()
    };
    Settings {
        batch_size: 3,
        acc_steps: 2,
        iterations: 12,
        grad_clip: Some(0.5),
        eval_freq: 3,
        save_checkpoint_freq: Some(4),
        ..Settings::of(model)
    }
}

fn data(settings: &Settings) -> Data {
    let tokenizer = Tokenizer::bytes();
    let text: String =
        (0..400).map(|i| format!("{i} bottles of beer on the wall, {} bottles of beer. ", i * i)).collect();
    let mut train = tokenizer.encode(&text).unwrap();
    let validation = train.split_off(15_000);
    let corpus = Corpus { train: train.into(), validation: validation.into(), tokenizer: Some(tokenizer) };
    corpus.batches(settings).unwrap()
}

/// Trains in a folder until `stop_at`, if anywhere.
fn run(settings: &Settings, folder: &Path, resume: bool, stop_at: Option<usize>) -> Result<Outcome, Error> {
    let stop = AtomicBool::new(false);
    let resume = if resume { Resume::Newest } else { Resume::No };
    let limits = Limits { experiment: Some(folder), resume, stop: Some(&stop), ..Limits::default() };
    train(settings, &data(settings), &Device::Cpu, &limits, &mut |event| {
        if let Event::Step(iteration, ..) = event {
            stop.store(Some(iteration) == stop_at, Ordering::Relaxed);
        }
    })
}

fn weights(folder: &Path, iteration: usize) -> Vec<u8> {
    fs::read(checkpoint::EXPERIMENT.path(folder, iteration).join("model.safetensors")).unwrap()
}

/// The metrics without what depends on the clock.
fn metrics(folder: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        let fields = line.as_object_mut().unwrap();
        fields.remove("tokens_per_second").or_else(|| fields.remove("seconds")).unwrap();
        line
    };
    text.lines().map(line).collect()
}

fn bits(model: &Gpt) -> Vec<u32> {
    let values = model.parameters().values().map(|var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    values.flatten().map(f32::to_bits).collect()
}

#[test]
fn the_same_seed_makes_the_same_weights_and_another_seed_others() {
    let trained = |settings: &Settings| {
        let outcome = train(settings, &data(settings), &Device::Cpu, &Limits::default(), &mut |_| {}).unwrap();
        let Outcome::Finished { model, .. } = outcome else { panic!("it was not stopped") };
        bits(&model)
    };
    let settings = settings();
    let first = trained(&settings);
    assert_eq!(first, trained(&settings));
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert!(first == one_thread.install(|| trained(&settings)), "the number of threads changes the weights");
    assert_ne!(first, trained(&Settings { seed: 3, ..settings }));
}

/// With the Transformer-XL cache, which begins anew with each row: a checkpoint need not hold it.
fn transformer_xl() -> Settings {
    let model = settings().model;
    let model = GptConfig { model: Variant::BaseRotary, mem_freq: None, group_dropout: None, ..model };
    let model = GptConfig { positional_encoder: PositionalEncoder::Rotary, pos_jump_on_mem: None, ..model };
    let optimization_process = Process::TransformerXl { total_sequence_length: 110, mem_cache_size: 30 };
    Settings { model, optimization_process, ..settings() }
}

/// With exercises among the rows and landmarks of others in the softmax.
fn retrieval() -> Settings {
    let model = GptConfig { sequence_length: 260, mem_freq: Some(25), ..settings().model };
    let exercises = Some(ExerciseOptions { exercise_rows: 0.4, ..ExerciseOptions::default() });
    let negatives = Some(NegativeRows { negative_rows: 2, negative_share: 0.5, negative_top_k: 4 });
    Settings { model, whole_blocks: true, exercises, negatives, batch_size: 5, acc_steps: 1, ..settings() }
}

#[test]
fn a_run_begins_with_another_models_weights() {
    let (folder, settings) = (tempfile::tempdir().unwrap(), Settings { iterations: 1, lr: 1e-12, ..settings() });
    let model = Gpt::init(&settings.model, 77, candle_core::DType::F32, &Device::Cpu).unwrap();
    model.save(folder.path()).unwrap();
    let begin = |settings: &Settings| {
        let limits = Limits { init_from: Some(folder.path()), ..Limits::default() };
        train(settings, &data(settings), &Device::Cpu, &limits, &mut |_| {})
    };
    let Outcome::Finished { model: after, .. } = begin(&settings).unwrap() else { panic!("it was not stopped") };
    let weights = |model: &Gpt| bits(model).into_iter().map(f32::from_bits).collect::<Vec<_>>();
    let change = weights(&model).iter().zip(weights(&after)).map(|(a, b)| (a - b).abs()).fold(0., f32::max);
    assert!(change < 1e-9, "{change}");
    let other = GptConfig { n_head: settings.model.n_head / 2, ..settings.model.clone() };
    let Err(error) = begin(&Settings { model: other, ..settings }) else { panic!("the heads differ") };
    assert!(error.to_string().starts_with("--init_from"), "{error}");
}

#[test]
fn a_stopped_and_resumed_run_ends_as_one_that_was_not() {
    let at_borders = Settings { model: GptConfig { landmarks: Placement::Sentence, ..settings().model }, ..settings() };
    let with = |opt| Settings { opt, ..settings() };
    for settings in [at_borders, with(Method::Sgd), with(Method::Adafactor), transformer_xl(), retrieval()] {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert!(matches!(run(&settings, whole.path(), false, None).unwrap(), Outcome::Finished { .. }));
        for (resume, stop_at) in [(false, 2), (true, 3), (true, 8), (true, 11)] {
            let outcome = run(&settings, parts.path(), resume, Some(stop_at)).unwrap();
            let Outcome::Stopped { iteration, checkpoint, .. } = outcome else { panic!("it was to stop at {stop_at}") };
            assert_eq!((iteration, checkpoint.unwrap()), (stop_at, checkpoint::EXPERIMENT.path(parts.path(), stop_at)));
        }
        assert!(matches!(run(&settings, parts.path(), true, None).unwrap(), Outcome::Finished { .. }));
        assert!(weights(whole.path(), 12) == weights(parts.path(), 12));
        assert_eq!(metrics(whole.path()), metrics(parts.path()));
        assert_eq!(metrics(whole.path()).len(), 12 + 4);
        let summary = |folder: &Path| fs::read_to_string(folder.join("summary.json")).unwrap();
        assert_eq!(summary(whole.path()), summary(parts.path()));
        assert!(matches!(run(&settings, parts.path(), true, None).unwrap(), Outcome::AlreadyFinished));
    }
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_is_taken() {
    let (whole, damaged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(&settings(), whole.path(), false, None).unwrap();
    run(&settings(), damaged.path(), false, Some(9)).unwrap();
    let path = checkpoint::EXPERIMENT.path(damaged.path(), 9).join("optimizer.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    fs::create_dir(damaged.path().join(".ckpt_10.new.tmp")).unwrap();

    let mut notes = Vec::new();
    let limits = Limits { experiment: Some(damaged.path()), resume: Resume::Newest, ..Limits::default() };
    train(&settings(), &data(&settings()), &Device::Cpu, &limits, &mut |event| {
        if let Event::Note(note) = event {
            notes.push(note);
        }
    })
    .unwrap();
    let [leftover, skipped, resumed] = &notes[..] else { panic!("{notes:?}") };
    assert!(leftover.contains(".ckpt_10.new.tmp"), "{leftover}");
    assert!(skipped.contains("ckpt_9") && skipped.contains("optimizer.safetensors"), "{skipped}");
    assert!(skipped.ends_with("going back to iteration 8") && resumed.contains("ckpt_8"), "{skipped} {resumed}");
    assert!(weights(whole.path(), 12) == weights(damaged.path(), 12));
    assert_eq!(metrics(whole.path()), metrics(damaged.path()));
}

#[test]
fn work_is_not_overwritten_nor_continued_as_another_run() {
    let folder = tempfile::tempdir().unwrap();
    let error = |settings: &Settings, resume| match run(settings, folder.path(), resume, None) {
        Ok(_) => panic!("it was to be refused"),
        Err(error) => error,
    };
    run(&settings(), folder.path(), false, Some(5)).unwrap();
    assert!(matches!(error(&settings(), false), Error::Unfinished { iteration: 5, .. }));
    let text = error(&Settings { lr: 1e-3, ..settings() }, true).to_string();
    assert!(text.contains("ckpt_5: its lr is 0.002, this command's 0.001"), "{text}");
    let other = settings();
    let other = Settings { model: GptConfig { dropout: 0.2, ..other.model.clone() }, ..other };
    assert!(error(&other, true).to_string().contains("its dropout is 0.1, this command's 0.2"));
    let text = error(&Settings { whole_blocks: true, ..settings() }, true).to_string();
    assert!(text.contains("its whole_blocks is false, this command's true"), "{text}");
    let text = error(&Settings { batch_size: 5, ..retrieval() }, true).to_string();
    assert!(text.contains("ckpt_5: its "), "{text}");
    // What changes no weight may change.
    let kept = Settings { keep_checkpoints: Some(1), save_checkpoint_freq: Some(2), ..settings() };
    run(&kept, folder.path(), true, None).unwrap();
    assert_eq!(checkpoint::EXPERIMENT.iterations(folder.path()).unwrap(), [12]);
}

#[test]
fn one_process_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { experiment: Some(folder.path()), ..Limits::default() };
    let mut refused = 0;
    train(&settings(), &data(&settings()), &Device::Cpu, &limits, &mut |event| {
        if let Event::Begin(..) = event {
            refused += usize::from(matches!(run(&settings(), folder.path(), true, None), Err(Error::Locked { .. })));
        }
    })
    .unwrap();
    assert_eq!(refused, 1);
}

#[test]
fn settings_out_of_range_are_named() {
    type Change = fn(&mut Settings);
    let cases: [(&str, Change); 9] = [
        ("--batch_size", |s| s.batch_size = 0),
        ("--acc_steps", |s| s.acc_steps = 0),
        ("--iterations", |s| s.iterations = 0),
        ("--eval_freq", |s| s.eval_freq = 0),
        ("--lr", |s| s.lr = f64::NAN),
        ("--warmup_percent", |s| s.warmup_percent = 1.1),
        ("--weight_decay", |s| s.weight_decay = -1.),
        ("--grad_clip", |s| s.grad_clip = Some(0.)),
        ("--beta2", |s| s.opt = Method::AdamW { beta1: 0.9, beta2: 1. }),
    ];
    for (flag, change) in cases {
        let mut settings = settings();
        change(&mut settings);
        let error = settings.check().unwrap_err().to_string();
        assert!(error.starts_with(flag), "{error}");
    }
}

#[test]
fn what_teaches_retrieval_is_in_the_weights_and_must_fit() {
    let trained = |settings: &Settings| {
        let settings = Settings { iterations: 2, ..settings.clone() };
        let outcome = train(&settings, &data(&settings), &Device::Cpu, &Limits::default(), &mut |_| {}).unwrap();
        let Outcome::Finished { model, .. } = outcome else { panic!("it was not stopped") };
        bits(&model)
    };
    let all = trained(&retrieval());
    assert_ne!(all, trained(&Settings { negatives: None, ..retrieval() }));
    assert_ne!(all, trained(&Settings { exercises: None, ..retrieval() }));
    type Change = fn(&mut Settings);
    let cases: [(&str, Change); 5] = [
        ("--exercise_rows: exercises need --whole_blocks", |s| s.whole_blocks = false),
        ("--negative_rows: only --model landmark", |s| s.model.model = Variant::BaseRotary),
        ("negative_rows", |s| s.negatives.as_mut().unwrap().negative_rows = 4),
        ("negative_top_k", |s| s.negatives.as_mut().unwrap().negative_top_k = 9),
        ("--whole_blocks: the rows of transformer_xl", |s| {
            *s = Settings { whole_blocks: true, ..transformer_xl() };
        }),
    ];
    for (message, change) in cases {
        let mut settings = retrieval();
        change(&mut settings);
        let error = settings.check().unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    // Without text there are no exercises; in a short window none fits.
    let corpus = |tokenizer| Corpus { train: vec![65; 20_000].into(), validation: vec![].into(), tokenizer };
    let error = |settings: &Settings, tokenizer| corpus(tokenizer).batches(settings).err().unwrap().to_string();
    let large =
        Settings { model: GptConfig { vocab_size: 50304, landmark_id: 50260, ..retrieval().model }, ..retrieval() };
    let text = error(&large, None);
    assert!(text.starts_with("--exercise_rows: exercises are text"), "{text}");
    let short = Settings { model: GptConfig { sequence_length: 156, ..retrieval().model }, ..retrieval() };
    let text = error(&short, Some(Tokenizer::bytes()));
    assert!(text.starts_with("--sequence_length: a window has 151 tokens, an exercise needs up to"), "{text}");
}

#[test]
fn a_loss_that_is_no_number_stops_the_run() {
    let settings = Settings { lr: 1e30, grad_clip: None, opt: Method::Sgd, iterations: 50, ..settings() };
    let outcome = train(&settings, &data(&settings), &Device::Cpu, &Limits::default(), &mut |_| {});
    assert!(matches!(outcome, Err(Error::Diverged { .. })));
}
