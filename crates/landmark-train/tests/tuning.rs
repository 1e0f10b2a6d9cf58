//! Fine-tuning a LLaMA, whole or with adapters: a run that was stopped and resumed ends as one that was not.

use candle_core::{DType, Device, Tensor};
use landmark_attention::Attend;
use landmark_data::{Pretrained, Tokenizer};
use landmark_models::llama::{Llama, LlamaConfig, LoraConfig};
use landmark_train::{
    Anneal, Corpus, Data, Decay, Error, Event, Limits, Method, Model, Outcome, Process, Resume, Settings, Tuned,
    Tuning, checkpoint, train,
};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// A model that has never seen a landmark, with the tokenizer of bytes.
fn base(tied: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied,
    });
    let config = LlamaConfig::from_json(&config.to_string()).unwrap();
    let model = Llama::init(&config, 5, DType::F32, &Device::Cpu).unwrap();
    model.save(folder.path(), DType::F32).unwrap();
    Tokenizer::bytes().save(folder.path()).unwrap();
    folder
}

fn settings(base: &Path, lora: Option<LoraConfig>) -> Settings<Tuning> {
    let model = Tuning { model_name_or_path: base.to_path_buf(), model_max_length: 40, mem_freq: 9, mem_id: 257, lora };
    Settings {
        model,
        optimization_process: Process::Landmark,
        precision: Default::default(),
        whole_blocks: true,
        exercises: None,
        negatives: None,
        batch_size: 2,
        eval_batch_size: None,
        acc_steps: 2,
        mean_gradients: true,
        seed: 42,
        iterations: 8,
        lr: 1e-2,
        warmup_percent: 0.,
        scheduler: Anneal::Trainer { warmup_steps: 2, then: Decay::Cosine },
        opt: Method::AdamW { beta1: 0.9, beta2: 0.999 },
        weight_decay: 0.1,
        grad_clip: Some(1.),
        logging_steps: None,
        eval_freq: 4,
        save_checkpoint_freq: Some(3),
        keep_checkpoints: Some(2),
        activation_checkpointing: false,
    }
}

fn lora(dropout: f64) -> Option<LoraConfig> {
    let target_modules = ["q_proj", "o_proj", "down_proj"].map(String::from).into();
    Some(LoraConfig { r: 3, lora_alpha: 6., lora_dropout: dropout, target_modules })
}

fn data(settings: &Settings<Tuning>) -> Data {
    let tokenizer = Tokenizer::bytes();
    let text: String =
        (0..100).map(|i| format!("{i} bottles of beer on the wall, {} bottles of beer. ", i * i)).collect();
    let mut train = tokenizer.encode(&text).unwrap();
    let validation = train.split_off(3_000);
    let corpus = Corpus { train: train.into(), validation: validation.into(), tokenizer: Some(tokenizer) };
    corpus.batches(settings).unwrap()
}

fn run(
    settings: &Settings<Tuning>,
    folder: &Path,
    resume: Resume,
    stop_at: Option<usize>,
) -> Result<(Outcome<Tuned>, Vec<f64>), Error> {
    let (stop, mut losses) = (AtomicBool::new(false), Vec::new());
    let limits = Limits { experiment: Some(folder), resume, stop: Some(&stop), ..Limits::default() };
    let outcome = train(settings, &data(settings), &Device::Cpu, &limits, &mut |event| {
        if let Event::Step(iteration, step, _) = event {
            losses.push(step.loss);
            stop.store(Some(iteration) == stop_at, Ordering::Relaxed);
        }
    })?;
    Ok((outcome, losses))
}

fn bits(outcome: &Outcome<Tuned>) -> Vec<(String, Vec<u32>)> {
    let Outcome::Finished { model, .. } = outcome else { panic!("it was not stopped") };
    let bits = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    model.parameters().iter().map(|(name, var)| (name.clone(), bits(var.as_detached_tensor()))).collect()
}

#[test]
fn a_stopped_and_resumed_run_ends_as_one_that_was_not() {
    for (tied, lora) in [(true, None), (false, None), (true, lora(0.2)), (false, lora(0.))] {
        let base = base(tied);
        let settings = settings(base.path(), lora);
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (outcome, losses) = run(&settings, whole.path(), Resume::No, None).unwrap();
        assert!(losses[7] < losses[0] && losses[0] < 5.7, "{losses:?}");
        let expected = bits(&outcome);
        assert!(matches!(run(&settings, parts.path(), Resume::No, Some(2)).unwrap().0, Outcome::Stopped { .. }));
        assert!(matches!(run(&settings, parts.path(), Resume::No, None), Err(Error::Unfinished { .. })));
        let (stopped, _) = run(&settings, parts.path(), Resume::Newest, Some(5)).unwrap();
        assert!(matches!(stopped, Outcome::Stopped { iteration: 5, .. }));
        // The newest two, and from the older of them.
        assert_eq!(checkpoint::TRAINER.iterations(parts.path()).unwrap(), [3, 5]);
        let older = checkpoint::TRAINER.path(parts.path(), 3);
        let recomputed = Settings { activation_checkpointing: true, ..settings.clone() };
        let (outcome, rest) = run(&recomputed, parts.path(), Resume::From(&older), None).unwrap();
        assert_eq!(rest, losses[3..]);
        assert!(bits(&outcome) == expected);

        let other = Settings { seed: 1, ..settings.clone() };
        let folder = tempfile::tempdir().unwrap();
        assert!(bits(&run(&other, folder.path(), Resume::No, None).unwrap().0) != expected);
    }
}

/// The checkpoint of a whole model is a folder that can be loaded, with the landmark in model and tokenizer.
#[test]
fn a_checkpoint_is_a_folder_of_a_landmark_model() {
    let base = base(false);
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(base.path(), None);
    let (outcome, _) = run(&settings, folder.path(), Resume::No, None).unwrap();
    let path = checkpoint::TRAINER.path(folder.path(), 8);
    let model = Llama::load(&path, DType::F32, &Device::Cpu).unwrap();
    let landmarks = model.config().landmarks.unwrap();
    assert_eq!((landmarks.mem_id, landmarks.mem_freq, landmarks.train_context_length), (257, 9, 44));
    assert!(!landmarks.include_landmark_in_loss);
    assert_eq!(Pretrained::from_folder(&path).unwrap().tokenizer.landmark_id(), Some(257));
    let Outcome::Finished { model: tuned, .. } = outcome else { panic!() };
    let ids = Tensor::new(&[[1u32, 2, 3, 4, 5, 6, 7, 8, 9, 257, 1, 2]], &Device::Cpu).unwrap();
    let logits = |model: &Llama| {
        let mut attention = model.window_attention(&ids).unwrap();
        let hidden = model.hidden(&ids, &mut attention as &mut dyn Attend).unwrap();
        model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(logits(&model), logits(tuned.model()));
}

#[test]
fn what_cannot_be_is_refused_by_the_flags_name() {
    let base = base(true);
    let error = |change: &dyn Fn(&mut Settings<Tuning>)| {
        let mut settings = settings(base.path(), lora(0.));
        change(&mut settings);
        let folder = tempfile::tempdir().unwrap();
        let settings = settings;
        let valid = self::settings(base.path(), None);
        let limits = Limits { experiment: Some(folder.path()), ..Limits::default() };
        match train(&settings, &data(&valid), &Device::Cpu, &limits, &mut |_| {}) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("it was not refused"),
        }
    };
    assert!(error(&|settings| settings.model.mem_freq = 0).contains("--mem_freq"));
    assert!(error(&|settings| settings.model.model_max_length = 60).contains("--model_max_length: 60 tokens"));
    assert!(error(&|settings| settings.model.mem_id = 3).contains("--model_name_or_path: the landmark"));
    assert!(error(&|settings| settings.model.lora.as_mut().unwrap().r = 0).contains("lora_r"));
    let unknown = |settings: &mut Settings<Tuning>| {
        settings.model.lora.as_mut().unwrap().target_modules = vec!["c_attn".into()];
    };
    let error = error(&unknown);
    assert!(error.contains("c_attn") && error.contains("q_proj"), "{error}");
}

#[test]
fn another_model_or_block_is_another_run() {
    let base = base(true);
    let folder = tempfile::tempdir().unwrap();
    let first = settings(base.path(), None);
    run(&first, folder.path(), Resume::No, Some(1)).unwrap();
    for (name, change) in [("mem_freq", 8), ("model_max_length", 30)] {
        let mut other = first.clone();
        match name {
            "mem_freq" => other.model.mem_freq = change,
            _ => other.model.model_max_length = change,
        }
        match run(&other, folder.path(), Resume::Newest, None) {
            Err(Error::OtherRun { setting, .. }) => assert_eq!(setting, name),
            other => panic!("{name}: {}", other.err().map_or("went on".into(), |error| error.to_string())),
        }
    }
    let _ = fs::remove_dir_all(folder);
}
