//! What `landmark finetune` refuses, by the flag's name and with the reason.

use super::flags::{Flags, Refused, Strategy};
use crate::args::truth;
use anyhow::bail;
use candle_core::Device;

const ONE: &str = "one process trains on one device";
const GGUF: &str = "quantized weights come from GGUF files: give one as --model_name_or_path with --lora_r";
const EPOCHS: &str = "rows are drawn from all of the data, so that no step ends an epoch; use steps";

/// Refuses what cannot be done.
pub fn check(flags: &Flags) -> anyhow::Result<()> {
    let Refused {
        fp16,
        deepspeed,
        local_rank,
        overwrite_output_dir,
        adam_epsilon,
        data_seed,
        group_by_length,
        load_in_4bit,
        load_in_8bit,
        load_best_model_at_end,
        push_to_hub,
    } = &flags.refused;
    // What asks for what happens anyway is no reason to stop.
    let on = |flag: &Option<String>| flag.as_ref().is_some_and(|value| truth(value) != Ok(false));
    let landmarks =
        "landmarks as targets would teach to write what no reader takes; the authors' own fast path has them so too";
    let refusals = [
        ("use_flash False", !flags.use_flash, landmarks),
        ("fp16", on(fp16), "its gradients vanish; use --bf16 True"),
        ("deepspeed", deepspeed.is_some(), ONE),
        ("local_rank", local_rank.is_some_and(|rank| rank > 0), ONE),
        ("overwrite_output_dir", on(overwrite_output_dir), "remove the folder, or name another --output_dir"),
        ("adam_epsilon", adam_epsilon.is_some_and(|eps| eps != 1e-8), "it is 1e-8"),
        ("data_seed", data_seed.is_some_and(|seed| seed != flags.seed), "--seed decides the data too"),
        ("group_by_length", on(group_by_length), "all rows have one length"),
        ("load_in_4bit", on(load_in_4bit), GGUF),
        ("load_in_8bit", on(load_in_8bit), GGUF),
        ("load_best_model_at_end", on(load_best_model_at_end), "the model that is kept is the last one"),
        ("push_to_hub", on(push_to_hub), "nothing is sent anywhere"),
        ("evaluation_strategy epoch", flags.evaluation_strategy == Strategy::Epoch, EPOCHS),
        ("save_strategy epoch", flags.save_strategy == Strategy::Epoch, EPOCHS),
        (
            "eval_steps",
            flags.eval_steps.is_some() && flags.evaluation_strategy == Strategy::No,
            "it needs --evaluation_strategy steps",
        ),
    ];
    let retrieval = flags.exercises.refusals().into_iter().chain(flags.negatives.refusals());
    if let Some((flag, _, reason)) = refusals.into_iter().chain(retrieval).find(|(_, given, _)| *given) {
        bail!("--{flag} is refused: {reason}");
    }
    // What launchers such as torchrun tell every process that they start.
    if let Some(size) = std::env::var("WORLD_SIZE").ok().filter(|size| size.trim().parse() != Ok(1)) {
        bail!("WORLD_SIZE={size}: {ONE}; start `landmark finetune` itself, without a launcher");
    }
    Ok(())
}

/// Refuses what cannot be done on this device.
pub fn check_device(flags: &Flags, device: &Device) -> anyhow::Result<()> {
    if !device.is_cpu() && flags.lora_dropout.is_some_and(|dropout| dropout > 0.) {
        bail!("--lora_dropout is refused: dropout is not built on GPUs; leave it out, or use --device cpu");
    }
    Ok(())
}
