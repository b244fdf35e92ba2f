//! Descriptions of all families in both generations, and what is wrong in others.

use izar_common::gguf::{File, Value as Meta, Writer};
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn sample() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 512, "max_position_embeddings": 256, "num_hidden_layers": 2,
        "hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32", "tie_word_embeddings": true,
    })
}
fn read(change: impl FnOnce(&mut Value)) -> Result<Config, String> {
    let mut value = sample();
    change(&mut value);
    Config::from_json("config.json", value.to_string().as_bytes()).map_err(|e| e.to_string())
}
fn refused(key: &str, value: Value) -> String {
    read(|v| v[key] = value).unwrap_err()
}

#[test]
fn both_generations_say_the_same() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let four = read(|v| {
        v["rope_theta"] = json!(5e5);
        v["rope_scaling"] = llama3.clone();
    });
    let five = read(|v| {
        v["rope_parameters"] = llama3;
        v["rope_parameters"]["rope_theta"] = json!(5e5);
    });
    assert_eq!(four, five);
    let config = four.unwrap();
    assert_eq!((config.head_dim(), config.kv_heads(), config.tied, config.rope_theta), (16, 2, true, 5e5));
    assert!(matches!(config.rope_scaling, Scaling::Llama3 { factor: 8.0, .. }));
}

#[test]
fn what_is_not_supported_is_refused_by_its_key() {
    assert_eq!(refused("sandwich_norm", json!(true)), "config.json: key `sandwich_norm` is not supported");
    assert!(refused("attention_bias", json!(true)).contains("`attention_bias` is not supported"));
    let fp8 = refused("quantization_config", json!({"quant_method": "fp8", "fmt": "e4m3"}));
    assert!(fp8.contains("`quantization_config` asks for \"fp8\""), "{fp8}");
    assert!(refused("hidden_act", json!("gelu")).contains("`hidden_act`"));
    assert!(refused("sliding_window", json!(4096)).contains("`sliding_window`"));
    assert!(refused("layer_types", json!(["sliding_attention"])).contains("`layer_types`"));
    assert!(
        refused("model_type", json!("mamba")).contains("supported are llama, qwen2, qwen3, qwen3_moe, deepseek_v2")
    );
    assert!(refused("rope_scaling", json!({"type": "ntk", "factor": 2})).contains("`rope_scaling.rope_type`"));
    let strange = json!({"type": "linear", "factor": 2, "mscale": 0.7});
    assert!(refused("rope_scaling", strange).contains("`rope_scaling.mscale` is not supported"));
}

#[test]
fn neutral_and_harmless_keys_are_passed_over() {
    let plain = read(|_| {}).unwrap();
    let more = read(|v| {
        for (key, value) in [("mlp_bias", json!(false)), ("_name_or_path", json!("x")), ("new_thing", json!(null))] {
            v[key] = value;
        }
    });
    assert_eq!(more.unwrap(), plain);
}

#[test]
fn impossible_sizes_are_refused_by_their_key() {
    assert!(refused("hidden_size", json!(0)).contains("`hidden_size`"));
    assert!(refused("vocab_size", json!(1_u64 << 40)).contains("`vocab_size`"));
    assert!(refused("num_hidden_layers", json!("two")).contains("`num_hidden_layers`"));
    assert!(refused("num_key_value_heads", json!(3)).contains("`num_key_value_heads`"));
    assert!(refused("head_dim", json!(15)).contains("`head_dim`"));
    assert!(refused("rope_theta", json!(-1.0)).contains("`rope_theta`"));
    assert!(read(|v| drop(v.as_object_mut().unwrap().remove("hidden_size"))).unwrap_err().contains("is missing"));
    assert!(Config::from_json("config.json", b"[]").is_err());
    assert!(Config::from_json("config.json", b"{").is_err());
}

#[test]
fn ends_of_text_are_one_or_many() {
    assert_eq!(tokens(Some(&json!(2))), [2]);
    assert_eq!(tokens(Some(&json!([2, 7]))), [2, 7]);
    assert_eq!(tokens(None), [] as [Token; 0]);
}

/// What transformers 5 writes of a small model with experts.
fn qwen3_moe() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "decoder_sparse_step": 1, "head_dim": 32, "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 112,
        "max_position_embeddings": 512, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 48,
        "norm_topk_prob": true, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4,
        "num_key_value_heads": 2, "num_local_experts": 8, "output_router_logits": false, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "router_aux_loss_coef": 0.001,
        "sliding_window": null, "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 512,
    })
}

/// What DeepSeek's own `config.json` says (transformers 4), with the sizes of DeepSeek-V3.
fn deepseek_v3() -> Value {
    let text = r#"{
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
    }"#;
    serde_json::from_str(text).unwrap()
}

/// The same as transformers 5 would write it.
fn deepseek_v3_in_five() -> Value {
    let mut value = deepseek_v3();
    let map = value.as_object_mut().unwrap();
    for gone in ["rope_theta", "scoring_func", "topk_method", "moe_layer_freq", "ep_size", "auto_map"] {
        map.remove(gone);
    }
    let mut rope = map.remove("rope_scaling").unwrap();
    rope["rope_theta"] = json!(10000.0);
    rope["rope_type"] = rope.as_object_mut().unwrap().remove("type").unwrap();
    for (key, more) in [
        ("rope_parameters", rope),
        ("head_dim", json!(64)),
        ("qk_head_dim", json!(192)),
        ("rope_interleave", json!(true)),
        ("output_router_logits", json!(false)),
    ] {
        map.insert(key.to_owned(), more);
    }
    value
}

/// DeepSeek-V2-Lite in the form of transformers 4.
fn deepseek_v2_lite() -> Value {
    let mut value = deepseek_v3();
    for (key, other) in [
        ("model_type", json!("deepseek_v2")),
        ("q_lora_rank", json!(null)),
        ("n_group", json!(1)),
        ("topk_group", json!(1)),
        ("topk_method", json!("greedy")),
        ("scoring_func", json!("softmax")),
        ("norm_topk_prob", json!(false)),
        ("routed_scaling_factor", json!(1.0)),
        ("n_routed_experts", json!(64)),
        ("n_shared_experts", json!(2)),
        ("num_experts_per_tok", json!(6)),
        ("first_k_dense_replace", json!(1)),
        ("aux_loss_alpha", json!(0.001)),
        ("seq_aux", json!(true)),
    ] {
        value[key] = other;
    }
    value["rope_scaling"]["mscale"] = json!(0.707);
    value["rope_scaling"]["mscale_all_dim"] = json!(0.707);
    value
}

fn parse(value: &Value) -> Result<Config, String> {
    Config::from_json("config.json", value.to_string().as_bytes()).map_err(|e| e.to_string())
}

/// Expects a refusal that says all of `words` when a key of a description is changed.
fn refuses(mut value: Value, key: &str, to: Value, words: &str) {
    value[key] = to;
    let error = parse(&value).expect_err("this description is wrong");
    assert!(error.contains(words), "`{error}` does not say `{words}`");
}

#[test]
fn experts_of_qwen_lie_where_the_step_and_the_list_say() {
    let config = parse(&qwen3_moe()).unwrap();
    let experts = config.experts(0).unwrap();
    assert_eq!((experts.count, experts.per_token, experts.intermediate, experts.shared), (8, 2, 48, 0));
    assert_eq!((experts.scoring, experts.groups, experts.normalized), (Scoring::Softmax, 1, true));
    assert!(config.qk_norm() && !config.qkv_bias() && config.head_dim() == 32);
    let mut stepped = qwen3_moe();
    stepped["decoder_sparse_step"] = json!(2);
    stepped["mlp_only_layers"] = json!([3]);
    stepped["num_experts"] = stepped["num_local_experts"].take();
    let config = parse(&stepped).unwrap();
    assert_eq!((0..4).map(|layer| config.experts(layer).is_some()).collect::<Vec<_>>(), [false, true, false, false]);
    refuses(qwen3_moe(), "mlp_only_layers", json!([4]), "`mlp_only_layers` names what is not a layer");
    refuses(qwen3_moe(), "num_experts_per_tok", json!(9), "`num_experts_per_tok` is more than can be chosen from");
    refuses(qwen3_moe(), "num_local_experts", json!(null), "`num_local_experts` is missing");
    refuses(qwen3_moe(), "shared_expert_intermediate_size", json!(64), "`shared_expert_intermediate_size`");
}

#[test]
fn deepseek_is_the_same_in_both_generations() {
    let four = parse(&deepseek_v3()).unwrap();
    assert_eq!(Ok(&four), parse(&deepseek_v3_in_five()).as_ref());
    let latent =
        Latent { q_rank: Some(1536), kv_rank: 512, nope_dim: 128, rope_dim: 64, value_dim: 128, interleaved: true };
    assert_eq!(four.attention, Attention::Latent(latent));
    assert_eq!((four.head_dim(), four.rotary_dim(), four.rope_frequencies().len()), (192, 64, 32));
    assert_eq!((four.cache_values(), four.mixture().unwrap().count), (576, 256));
    assert!(four.experts(2).is_none());
    let experts = four.experts(3).unwrap();
    assert_eq!((experts.count, experts.per_token, experts.shared, experts.scale), (256, 8, 1, 2.5));
    assert_eq!((experts.groups, experts.groups_kept, experts.normalized), (8, 4, true));
    assert_eq!(experts.scoring, Scoring::Sigmoid);
    // YaRN's weights cancel out in cosines, and square in scores.
    assert_eq!(four.rope_magnitude(), 1.0);
    let gain = 0.1 * 40_f32.ln() + 1.0;
    assert!((four.score_scale() - gain * gain / 192_f32.sqrt()).abs() < 1e-6);
}

#[test]
fn the_second_generation_of_deepseek_scores_by_softmax() {
    let lite = parse(&deepseek_v2_lite()).unwrap();
    let Attention::Latent(latent) = lite.attention else { panic!("no latent attention") };
    assert_eq!((lite.family, latent.q_rank, latent.interleaved), (Family::DeepseekV2, None, true));
    let experts = lite.experts(1).unwrap();
    assert_eq!((experts.scoring, experts.groups, experts.groups_kept), (Scoring::Softmax, 1, 1));
    assert_eq!((experts.normalized, experts.shared, experts.scale), (false, 2, 1.0));
    let gain = 0.0707 * 40_f32.ln() + 1.0;
    assert!((lite.score_scale() - gain * gain / 192_f32.sqrt()).abs() < 1e-6);
    let mut whole = deepseek_v2_lite();
    (whole["topk_method"], whole["n_group"], whole["topk_group"]) = (json!("group_limited_greedy"), json!(8), json!(3));
    let experts = parse(&whole).unwrap();
    assert_eq!((experts.experts(1).unwrap().groups, experts.experts(1).unwrap().groups_kept), (8, 3));
}

#[test]
fn what_deepseek_does_not_compute_is_refused_by_its_key() {
    let fp8 = json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"});
    refuses(deepseek_v3(), "quantization_config", fp8, "`quantization_config` asks for \"fp8\"");
    refuses(deepseek_v3(), "scoring_func", json!("softmax"), "`scoring_func` is \"softmax\"");
    refuses(deepseek_v3(), "topk_method", json!("greedy"), "`topk_method` is \"greedy\"");
    refuses(deepseek_v3(), "moe_layer_freq", json!(2), "`moe_layer_freq` is 2");
    refuses(deepseek_v3(), "n_group", json!(7), "`n_group` does not divide");
    refuses(deepseek_v3(), "n_group", json!(256), "`n_group` leaves fewer than two");
    refuses(deepseek_v3(), "n_group", json!(null), "`n_group` is missing");
    refuses(deepseek_v3(), "topk_group", json!(9), "`topk_group` is more");
    refuses(deepseek_v3(), "num_key_value_heads", json!(64), "`num_key_value_heads` is 64");
    refuses(deepseek_v3(), "qk_rope_head_dim", json!(63), "`qk_rope_head_dim` is not even");
    refuses(deepseek_v3(), "attention_bias", json!(true), "`attention_bias` is not supported");
    refuses(deepseek_v3(), "index_topk", json!(2048), "`index_topk` is not supported");
    refuses(deepseek_v2_lite(), "norm_topk_prob", json!(true), "`norm_topk_prob` is true");
    refuses(deepseek_v2_lite(), "topk_method", json!("best"), "`topk_method` is \"best\"");
    let strange = json!({"type": "yarn", "factor": 4, "beta_quick": 2});
    refuses(deepseek_v3(), "rope_scaling", strange, "`rope_scaling.beta_quick` is not supported");
    refuses(deepseek_v3(), "rope_scaling", json!({"type": "yarn", "factor": -4}), "`rope_scaling.factor`");
    refuses(deepseek_v3(), "rope_scaling", json!("yarn"), "`rope_scaling` is not an object");
}

#[test]
fn stretched_dense_models_multiply_their_rotation() {
    let config = read(|v| {
        v["model_type"] = json!("qwen2");
        v["rope_scaling"] = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
    });
    let config = config.unwrap();
    assert!((config.rope_magnitude() - (0.1 * 4_f32.ln() + 1.0)).abs() < 1e-6);
    assert_eq!(config.score_scale(), 0.25);
    // A factor that is not given is what the contexts say.
    let implied = read(|v| {
        v["model_type"] = json!("qwen2");
        v["rope_scaling"] = json!({"type": "yarn", "factor": null, "original_max_position_embeddings": 64});
    });
    assert_eq!(implied.unwrap(), config);
}

/// GGUF metadata: an architecture, and keys under its name.
fn gguf(architecture: &str, keys: &[(&str, Meta)]) -> Result<Config, String> {
    let mut writer = Writer::default().key("general.architecture", architecture).key("tokenizer.ggml.tokens", ["a"]);
    for (key, value) in keys {
        writer = writer.key(&format!("{architecture}.{key}"), value.clone());
    }
    Config::from_gguf("m.gguf", &File::from_bytes(writer.finish()).unwrap()).map_err(|e| e.to_string())
}

/// The keys that all architectures have, and more.
fn keys(more: &[(&'static str, Meta)]) -> Vec<(&'static str, Meta)> {
    let mut all = vec![
        ("context_length", 163_840_u32.into()),
        ("block_count", 61_u32.into()),
        ("embedding_length", 7168_u32.into()),
        ("feed_forward_length", 18_432_u32.into()),
        ("attention.head_count", 128_u32.into()),
        ("attention.layer_norm_rms_epsilon", 1e-6_f32.into()),
        ("rope.freq_base", 10_000_f32.into()),
    ];
    for (key, value) in more {
        all.retain(|(other, _)| other != key);
        all.push((*key, value.clone()));
    }
    all
}

fn deepseek2() -> Vec<(&'static str, Meta)> {
    keys(&[
        ("vocab_size", 129_280_u32.into()),
        ("leading_dense_block_count", 3_u32.into()),
        ("attention.head_count_kv", 1_u32.into()),
        ("attention.q_lora_rank", 1536_u32.into()),
        ("attention.kv_lora_rank", 512_u32.into()),
        ("attention.key_length", 576_u32.into()),
        ("attention.value_length", 512_u32.into()),
        ("attention.key_length_mla", 192_u32.into()),
        ("attention.value_length_mla", 128_u32.into()),
        ("expert_feed_forward_length", 2048_u32.into()),
        ("expert_count", 256_u32.into()),
        ("expert_shared_count", 1_u32.into()),
        ("expert_used_count", 8_u32.into()),
        ("expert_group_count", 8_u32.into()),
        ("expert_group_used_count", 4_u32.into()),
        ("expert_weights_scale", 2.5_f32.into()),
        ("expert_weights_norm", true.into()),
        ("expert_gating_func", 2_u32.into()),
        ("rope.dimension_count", 64_u32.into()),
        ("rope.scaling.type", "yarn".into()),
        ("rope.scaling.factor", 40_f32.into()),
        ("rope.scaling.original_context_length", 4096_u32.into()),
        ("rope.scaling.yarn_log_multiplier", 0.1_f32.into()),
    ])
}

#[test]
fn gguf_says_the_same_of_deepseek() {
    let from_json = Config { vocabulary: 1, tied: true, ..parse(&deepseek_v3()).unwrap() };
    assert_eq!(gguf("deepseek2", &deepseek2()), Ok(from_json.clone()));
    // Files from before the cache was named: the sizes are those of the heads.
    let mut old = deepseek2();
    old.retain(|(key, _)| !key.ends_with("_mla") && !key.starts_with("attention.head_count_kv"));
    for (key, value) in &mut old {
        match *key {
            "attention.key_length" => *value = 192_u32.into(),
            "attention.value_length" => *value = 128_u32.into(),
            _ => {}
        }
    }
    old.push(("attention.head_count_kv", 128_u32.into()));
    assert_eq!(gguf("deepseek2", &old), Ok(from_json));
    let mut second = deepseek2();
    second.retain(|(key, _)| !["expert_gating_func", "expert_weights_norm", "attention.q_lora_rank"].contains(key));
    let second = gguf("deepseek2", &second).unwrap();
    assert_eq!(second.family, Family::DeepseekV2);
    assert_eq!(second.experts(3).unwrap().scoring, Scoring::Softmax);
}

#[test]
fn gguf_metadata_that_changes_the_computation_is_refused_by_its_key() {
    let check = |architecture: &str, keys: &[(&'static str, Meta)], key: &'static str, value: Meta, words: &str| {
        let mut keys: Vec<_> = keys.iter().filter(|(other, _)| *other != key).cloned().collect();
        keys.push((key, value));
        let error = gguf(architecture, &keys).expect_err("this metadata is wrong");
        assert!(error.contains(words), "`{error}` does not say `{words}`");
    };
    let two = |n: u32| Meta::from(n);
    let deepseek = |key, value, words: &str| check("deepseek2", &deepseek2(), key, value, words);
    deepseek("nextn_predict_layers", two(1), "`deepseek2.nextn_predict_layers` is not supported");
    deepseek("attention.key_length", two(192), "`deepseek2.attention.key_length` is 192");
    deepseek("attention.head_count_kv", two(128), "`deepseek2.attention.head_count_kv` is 128");
    deepseek("rope.dimension_count", two(192), "`deepseek2.attention.key_length` is 576");
    deepseek("rope.scaling.yarn_log_multiplier", two(0), "`deepseek2.rope.scaling.yarn_log_multiplier`");
    deepseek("rope.scaling.yarn_ext_factor", 0.5_f32.into(), "`deepseek2.rope.scaling.yarn_ext_factor` is 0.5");
    deepseek("expert_gating_func", two(3), "`deepseek2.expert_gating_func` is 3");
    deepseek("expert_group_count", two(7), "`deepseek2.expert_group_count` does not divide");
    deepseek("expert_count", "many".into(), "`deepseek2.expert_count` is not a number");
    deepseek("expert_weights_scale", f32::NAN.into(), "`deepseek2.expert_weights_scale` is not a number");
    let llama = |key, value, words: &str| check("llama", &keys(&[]), key, value, words);
    llama("expert_count", two(8), "m.gguf: key `llama.expert_count` is not supported");
    llama("rope.scaling.type", "longrope".into(), "`llama.rope.scaling.type` is \"longrope\"");
    llama("rope.scaling.type", "yarn".into(), "`llama.rope.scaling.factor` is missing");
    llama("attention.value_length", two(8), "`llama.attention.value_length` differs");
    llama("attention.head_count_kv", two(3), "`llama.attention.head_count_kv` does not divide");
    llama("attention.head_count", Meta::from([1_u32, 2]), "`llama.attention.head_count` is not a number");
    llama("block_count", two(0), "`llama.block_count` is not a number from 1");
    let error = gguf("mamba", &[]).unwrap_err();
    assert!(error.contains("`general.architecture` is \"mamba\"") && error.ends_with("qwen3moe, deepseek2"), "{error}");
}

#[test]
fn gguf_stretches_and_neutral_keys_are_read() {
    let scaling = |more: &[(&'static str, Meta)]| gguf("llama", &keys(more)).unwrap().rope_scaling;
    assert_eq!(scaling(&[("expert_count", 0_u32.into())]), Scaling::None);
    let factor = ("rope.scaling.factor", Meta::from(4_f32));
    assert_eq!(scaling(std::slice::from_ref(&factor)), Scaling::Linear { factor: 4.0 });
    assert_eq!(scaling(&[("rope.scaling.type", "none".into()), factor.clone()]), Scaling::None);
    let Scaling::Yarn(yarn) = scaling(&[("rope.scaling.type", "yarn".into()), factor]) else { panic!("no YaRN") };
    assert_eq!((yarn.original_context, yarn.beta_fast, yarn.score_gain), (163_840.0, 32.0, 1.0));
    let experts = [
        ("expert_count", Meta::from(8_u32)),
        ("expert_used_count", Meta::from(2_u32)),
        ("expert_feed_forward_length", Meta::from(48_u32)),
    ];
    let moe = gguf("qwen3moe", &keys(&experts)).unwrap();
    assert!(moe.experts(60).is_some_and(|experts| experts.normalized && experts.count == 8));
}

proptest! {
    /// A description with strange values is taken or refused, and a model that is taken has possible sizes.
    #[test]
    fn strange_descriptions_never_panic(
        family in 0..3_usize,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0..STRANGE.len()), 1..4),
    ) {
        let mut value = [qwen3_moe(), deepseek_v3(), deepseek_v2_lite()][family].clone();
        for (at, strange) in changes {
            let keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
            value[at.get(&keys)] = serde_json::from_str(STRANGE[strange]).unwrap();
        }
        if let Ok(config) = parse(&value) {
            prop_assert!(config.rope_frequencies().iter().all(|f| f.is_finite()));
            prop_assert!((0..config.layers).filter_map(|layer| config.experts(layer)).all(|e| e.per_token <= e.count));
            prop_assert!(config.heads % config.kv_heads() == 0 && config.score_scale() > 0.0);
        }
    }
}

/// Values that no key expects.
const STRANGE: &[&str] = &[
    "0",
    "1",
    "2",
    "-1",
    "1048576",
    "1048577",
    "18446744073709551615",
    "1e308",
    "1e-308",
    "0.5",
    "null",
    "true",
    "false",
    "\"\"",
    "\"yarn\"",
    "[]",
    "[0]",
    "[1, 1]",
    "[18446744073709551615]",
    "{}",
    "{\"rope_type\": \"yarn\"}",
    "{\"rope_type\": \"yarn\", \"factor\": 1e38, \"original_max_position_embeddings\": 1e-38}",
    "{\"rope_type\": \"llama3\", \"factor\": 2, \"low_freq_factor\": 1, \"high_freq_factor\": 1, \"original_max_position_embeddings\": 1}",
];
