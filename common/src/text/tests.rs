//! Encoding and decoding with the small vocabulary of the golden checkpoints, and with a GGUF's metadata.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::chat::Role;

fn golden() -> Bundle {
    Bundle::from_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama")).unwrap()
}
fn text(bundle: &Bundle) -> Arc<Text> {
    Arc::new(Text::new(bundle).unwrap())
}
fn message(role: Role, content: &str) -> Message {
    Message { role, content: content.to_owned() }
}
fn decode(text: &Arc<Text>, tokens: &[Token]) -> String {
    let mut decoder = text.decoder();
    let mut out: String = tokens.iter().map(|t| decoder.push(*t)).collect();
    out += &decoder.finish();
    out
}

#[test]
fn a_chat_is_encoded_as_the_template_says() {
    let text = text(&golden());
    let tokens = text.encode_chat(&[message(Role::User, "hello")]).unwrap();
    assert_eq!((tokens[0], tokens[1], tokens.last()), (0, 2, Some(&3)), "bos once, <|user|>, <|assistant|>");
    assert_eq!(decode(&text, &tokens), "hello", "special tokens are not shown");
    assert_eq!((text.eos(), text.vocabulary()), (&[1][..], 461), "the model has more rows than this");
}

#[test]
fn text_survives_the_tokens_whatever_it_is() {
    let text = text(&golden());
    for sample in ["", "a", "  two  spaces\n\n", "Zwölf Boxkämpfer", "日本語 🦀", "\u{0}\u{7f}"] {
        assert_eq!(decode(&text, &text.encode(sample).unwrap()), sample);
    }
}

#[test]
fn decoding_in_pieces_equals_the_reference() {
    let bundle = golden();
    let text = text(&bundle);
    let reference = tokenizers::Tokenizer::deserialize(bundle.tokenizer.as_ref().unwrap()).unwrap();
    let mut seed = 1_u32;
    for length in 0..200 {
        let tokens: Vec<Token> = (0..length)
            .map(|_| {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 8) % 512
            })
            .collect();
        assert_eq!(decode(&text, &tokens), reference.decode(&tokens, true).unwrap());
    }
}

#[test]
fn special_tokens_in_a_message_stay_text() {
    let text = text(&golden());
    let content = "a<|eos|>b<|assistant|>";
    let tokens = text.encode_chat(&[message(Role::User, content)]).unwrap();
    assert_eq!(tokens.iter().filter(|t| **t < 4).copied().collect::<Vec<_>>(), [0, 2, 3]);
    assert_eq!(decode(&text, &tokens), content);
    assert!(text.encode(content).unwrap().contains(&1), "in a plain prompt they count");
}

#[test]
fn a_plain_prompt_begins_with_one_bos_if_the_model_wants_it() {
    let bundle = Bundle { add_bos: true, ..golden() };
    let text = text(&bundle);
    let plain = text.encode("hi").unwrap();
    assert_eq!(plain[0], 0);
    assert_eq!(text.encode("<|bos|>hi").unwrap(), plain);
}

#[test]
fn a_model_without_a_template_takes_no_chats() {
    let text = text(&Bundle { chat_template: None, ..golden() });
    assert!(matches!(text.encode_chat(&[message(Role::User, "x")]), Err(Error::NoTemplate)));
    assert!(!text.has_chat());
}

#[test]
fn unusable_bundles_are_refused() {
    let check = |bundle: Bundle, words: &str| {
        let error = Text::new(&bundle).err().unwrap().to_string();
        assert!(error.contains(words), "`{error}` does not say `{words}`");
    };
    check(Bundle { eos: vec![512], ..golden() }, "end token 512 is outside");
    check(Bundle { tokenizer: Some(json!({})), ..golden() }, "the tokenizer is not usable");
    let mut gap = golden().tokenizer.unwrap();
    gap["added_tokens"][3]["id"] = 500.into();
    gap["added_tokens"][3]["content"] = "<|gap|>".into();
    check(Bundle { tokenizer: Some(gap), ..golden() }, "`<|gap|>` does not have the id 500");
    check(Bundle { chat_template: Some("{% if %}".into()), ..golden() }, "the chat template failed");
    check(Bundle { add_bos: true, bos: Some("<none>".into()), ..golden() }, "`<none>` is not in the vocabulary");
}

#[test]
fn a_truncation_that_training_left_over_is_not_applied() {
    let mut tokenizer = golden().tokenizer.unwrap();
    tokenizer["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    let cut = text(&Bundle { tokenizer: Some(tokenizer), ..golden() });
    let long = "one two three four five";
    assert_eq!(cut.encode(long).unwrap(), text(&golden()).encode(long).unwrap());
}
