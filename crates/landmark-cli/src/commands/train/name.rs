//! The name of an experiment, made of its settings as the reference makes it.

use super::flags::{Flags, text};

/// How many settings go into one folder's name.
const SETTINGS_A_FOLDER: usize = 10;

/// `{model}_lr{lr}_memfreq{mem_freq}_bs{batch}x{acc}_seqlen{length}/{settings that are not the default}_seed={seed}`.
pub fn experiment_name(flags: &Flags, defaults: &Flags) -> String {
    let changed = settings(flags).into_iter().zip(settings(defaults)).filter(|(ours, default)| ours != default);
    let changed: Vec<String> = changed.map(|((key, value), _)| format!("{key}={value}")).collect();
    let changed: Vec<String> = changed.chunks(SETTINGS_A_FOLDER).map(|chunk| chunk.join("_")).collect();
    let prefix = flags.run_prefix.as_ref().map(|prefix| format!("{}_", sane(prefix))).unwrap_or_default();
    format!(
        "{prefix}{}_lr{}_memfreq{}_bs{}x{}_seqlen{}/{}_seed={}",
        text(flags.model),
        float(flags.lr),
        none_or(flags.mem_freq),
        flags.batch_size,
        flags.acc_steps,
        flags.sequence_length,
        changed.join("/"),
        flags.seed
    )
}

/// The settings that a name spells out if they are not the default, in the order of the reference's flags; ours that
/// change the weights come last.
fn settings(flags: &Flags) -> Vec<(&'static str, String)> {
    let refused = &flags.refused;
    let settings = [
        ("device", flags.device.to_string()),
        ("iterations", flags.iterations.to_string()),
        ("warmup_percent", float(flags.warmup_percent)),
        ("weight_decay", float(flags.weight_decay)),
        ("beta1", float(flags.beta1)),
        ("beta2", float(flags.beta2)),
        ("scheduler", text(flags.scheduler)),
        ("opt", text(flags.opt)),
        ("eval_freq", flags.eval_freq.to_string()),
        ("results_base_folder", flags.results_base_folder.display().to_string()),
        ("save_checkpoint_freq", none_or(flags.save_checkpoint_freq)),
        ("dataset", none_or(flags.dataset.clone())),
        ("vocab_size", flags.vocab_size.unwrap_or(50304).to_string()),
        ("dropout", float(flags.dropout)),
        ("group_dropout", none_or(flags.group_dropout.map(float))),
        ("n_head", flags.n_head.to_string()),
        ("n_layer", flags.n_layer.to_string()),
        ("n_embd", flags.n_embd.to_string()),
        ("dtype", text(flags.dtype)),
        ("bias", truth(flags.bias).into()),
        ("no_compile", truth(flags.no_compile).into()),
        ("softmax_func", text(flags.softmax_func)),
        ("positional_encoder", text(flags.positional_encoder)),
        ("max_groups_for_softmax", flags.max_groups_for_softmax.to_string()),
        ("lm_cache", text(flags.lm_cache)),
        ("mem_cache_size", none_or(flags.mem_cache_size)),
        ("allow_cache_during_training", truth(flags.allow_cache_during_training).into()),
        ("postpone_lm_cache", truth(flags.postpone_lm_cache).into()),
        ("optimization_process", text(flags.optimization_process)),
        ("under_rem_score_prob", none_or(flags.under_rem_score_prob.map(float))),
        ("enable_rem_score", truth(refused.enable_rem_score).into()),
        ("pos_jump_on_mem", none_or(flags.pos_jump_on_mem)),
        ("total_sequence_length", none_or(flags.total_sequence_length)),
        ("grad_clip", none_or(flags.grad_clip.map(float))),
        ("landmarks", text(flags.landmarks)),
        ("norm", text(flags.norm)),
        ("mlp", text(flags.mlp)),
        ("qk_norm", truth(flags.qk_norm).into()),
        ("init_from", none_or(flags.init_from.as_ref().map(|folder| folder.display()))),
        ("whole_blocks", truth(flags.whole_blocks).into()),
        ("exercise_rows", float(flags.exercises.exercise_rows)),
        ("answer_weight", float(flags.exercises.answer_weight)),
        ("several_facts", float(flags.exercises.several_facts)),
        ("asked_again", float(flags.exercises.asked_again)),
        ("negative_rows", flags.negatives.negative_rows.to_string()),
        ("negative_share", float(flags.negatives.negative_share)),
        ("negative_top_k", flags.negatives.negative_top_k.to_string()),
    ];
    settings.map(|(key, value)| (key, sane(&value))).into()
}

/// A value as a part of a file's name: a path's separators would make folders.
fn sane(value: &str) -> String {
    let keep = |c: char| c.is_alphanumeric() || "._=+-".contains(c);
    value.chars().map(|c| if keep(c) { c } else { '-' }).collect()
}

fn none_or(value: Option<impl ToString>) -> String {
    value.map_or("None".into(), |value| value.to_string())
}

fn truth(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}

/// A number as Python prints it: 0.002, 1.0, 1e-05.
fn float(value: f64) -> String {
    let text = format!("{value:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        flags: Flags,
    }

    fn name(flags: &str) -> String {
        let parse = |flags: &str| Command::parse_from(std::iter::once("train").chain(flags.split_whitespace())).flags;
        experiment_name(&parse(flags), &parse(""))
    }

    #[test]
    fn names_are_those_of_the_reference() {
        let seed = "--config_format rotary --model landmark --n_embd 1024 --n_head 8 --n_layer 12 --batch_size 16 \
            --sequence_length 512 --acc_steps 8 --wandb_project memory-llm --dataset pg19 --iterations 240000 \
            --dropout 0.0 --positional_encoder rotary --softmax_func mem_opt --mem_freq 50 --save_checkpoint_freq 20000";
        assert_eq!(
            name(seed),
            "landmark_lr0.002_memfreq50_bs16x8_seqlen512/\
             iterations=240000_save_checkpoint_freq=20000_dataset=pg19_seed=2"
        );
        assert_eq!(name("--mem_freq None"), "base_rotary_lr0.002_memfreqNone_bs50x4_seqlen512/_seed=2");
        let eleven = "--run_prefix a --lr 1e-5 --iterations 9 --warmup_percent 0.1 --weight_decay 1 --beta1 0.8 \
            --beta2 0.9 --scheduler none --opt sgd --eval_freq 5 --save_checkpoint_freq 4 --dataset text --dropout 0.1";
        assert_eq!(
            name(eleven),
            "a_base_rotary_lr1e-05_memfreq50_bs50x4_seqlen512/iterations=9_warmup_percent=0.1_weight_decay=1.0_beta1=0.8_\
             beta2=0.9_scheduler=none_opt=sgd_eval_freq=5_save_checkpoint_freq=4_dataset=text/dropout=0.1_seed=2"
        );
    }

    #[test]
    fn values_make_no_folders() {
        assert_eq!(
            name("--results_base_folder ../x/y --run_prefix a/b --device cuda:1"),
            "a-b_base_rotary_lr0.002_memfreq50_bs50x4_seqlen512/device=cuda-1_results_base_folder=..-x-y_seed=2"
        );
    }

    #[test]
    fn flags_that_change_no_weight_of_ours_are_left_out() {
        let flags = "--resume --time_limit 5 --keep_checkpoints 2 --data_dir x --activation_checkpointing True";
        assert_eq!(name(flags), name(""));
    }
}
