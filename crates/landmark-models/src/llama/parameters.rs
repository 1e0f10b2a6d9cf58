//! The parameters of a LLaMA: their names, which are Hugging Face's, and their shapes.

use std::collections::BTreeMap;

use super::config::LlamaConfig;

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";
pub(super) const NORM: &str = "model.norm.weight";

/// Name and shape of every parameter, in the order of the names.
pub(super) fn specification(config: &LlamaConfig) -> BTreeMap<String, Vec<usize>> {
    let (c, d, hidden) = (config.hidden_size, config.head_dim, config.intermediate_size);
    let (q, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
    let (qkv_bias, o_bias) = config.attention_biases();
    let mut all = BTreeMap::from([(EMBEDDING.to_string(), vec![config.vocab_size, c]), (NORM.to_string(), vec![c])]);
    if !config.tie_word_embeddings {
        all.insert(HEAD.to_string(), vec![config.vocab_size, c]);
    }
    for layer in 0..config.num_hidden_layers {
        let layer = format!("model.layers.{layer}");
        let mut norm = |name: &str, width| all.insert(format!("{layer}.{name}.weight"), vec![width]);
        norm("input_layernorm", c);
        norm("post_attention_layernorm", c);
        if config.qk_norm() {
            norm("self_attn.q_norm", d);
            norm("self_attn.k_norm", d);
        }
        for (name, n_out, n_in, bias) in [
            ("self_attn.q_proj", q, c, qkv_bias),
            ("self_attn.k_proj", kv, c, qkv_bias),
            ("self_attn.v_proj", kv, c, qkv_bias),
            ("self_attn.o_proj", c, q, o_bias),
            ("mlp.gate_proj", hidden, c, config.mlp_bias),
            ("mlp.up_proj", hidden, c, config.mlp_bias),
            ("mlp.down_proj", c, hidden, config.mlp_bias),
        ] {
            all.insert(format!("{layer}.{name}.weight"), vec![n_out, n_in]);
            if bias {
                all.insert(format!("{layer}.{name}.bias"), vec![n_out]);
            }
        }
    }
    all
}

/// Whether a tensor of a checkpoint is none of the parameters, and needs not be: the head of a model that has the embedding for one, and
/// the frequencies that early versions of `transformers` saved.
pub(super) fn is_surplus(config: &LlamaConfig, name: &str) -> bool {
    (name == HEAD && config.tie_word_embeddings) || name.ends_with(".rotary_emb.inv_freq")
}
