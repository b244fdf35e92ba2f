//! What a user asks of an answer beside its prompt, through the real `openai` package and a real model: its form, several
//! of it, and how probable each token was.

use izar_tests::cluster::{Cluster, Options};
use izar_tests::python;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

/// Takes the endpoint, the CA and a key; prints one JSON object.
const PROGRAM: &str = r#"
import json, sys, httpx, openai, ssl

endpoint, ca, key = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
api = openai.OpenAI(base_url=endpoint + "/v1", api_key=key, max_retries=0, http_client=httpx.Client(verify=context))

def ask(question, **more):
    messages = [{"role": "user", "content": question}]
    return api.chat.completions.create(**{"model": "smollm2-135m", "messages": messages, "max_tokens": 100, "seed": 7, **more})

def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}

person = {"type": "object", "additionalProperties": False, "required": ["name", "age", "languages"], "properties": {
    "name": {"type": "string", "maxLength": 20},
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "languages": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"enum": ["French", "German", "Chinese"]}}}}
describe = "Describe a person named Anna, who is 30 and speaks French."

out = {}
out["schema"] = [ask(describe, response_format=form(person), temperature=t).choices[0].model_dump() for t in [0, 1]]
streamed = ask(describe, response_format=form(person), temperature=1, stream=True)
out["schema_streamed"] = "".join(c.choices[0].delta.content or "" for c in streamed)
out["object"] = ask("Give me an object.", response_format={"type": "json_object"}, max_tokens=400, temperature=0).choices[0].model_dump()
out["regex"] = ask("Is Paris in France?", extra_body={"guided_regex": "(Yes|No), [a-z ]{5,20}\\."}).choices[0].message.content

def refused(**more):
    try:
        ask("x", **more)
    except openai.BadRequestError as error:
        return {"param": error.param, "message": str(error)}
out["refused"] = [
    refused(response_format=form({"type": "strin"})),
    refused(response_format=form({"$ref": "https://example.com/schema.json"})),
    refused(extra_body={"guided_regex": "("}),
    refused(logit_bias={"1000000": 1}),
    refused(n=9),
]

several = ask("Name an animal.", n=3, max_tokens=8)
out["several"] = [choice.message.content for choice in several.choices]
out["several_usage"] = several.usage.model_dump()
texts, ends, usage = {}, {}, None
for chunk in ask("Name an animal.", n=3, max_tokens=8, stream=True, stream_options={"include_usage": True}):
    for choice in chunk.choices:
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    usage = chunk.usage or usage
out["streamed"], out["ends"], out["streamed_usage"] = [texts[i] for i in sorted(texts)], len(ends), usage.model_dump()
completion = api.completions.create(model="smollm2-135m", prompt="One, two,", n=2, max_tokens=4, temperature=1, seed=5, logprobs=2)
out["completions"] = [choice.model_dump() for choice in completion.choices]

scored = ask("What is the capital of France?", logprobs=True, top_logprobs=5, temperature=0, max_tokens=20).choices[0]
out["scored"], out["scored_text"] = [t.model_dump() for t in scored.logprobs.content], scored.message.content
streamed = []
for chunk in ask("What is the capital of France?", logprobs=True, top_logprobs=5, temperature=0, max_tokens=20, stream=True):
    if chunk.choices and chunk.choices[0].logprobs:
        streamed += [t.model_dump() for t in chunk.choices[0].logprobs.content]
out["scored_streamed"] = streamed
first = out["scored"][0]["top_logprobs"][0]
out["plain"] = ask("What is the capital of France?", temperature=0, max_tokens=20).choices[0].message.content
print(json.dumps(out))
"#;

fn program(cluster: &Cluster) -> Value {
    let ready = cluster.ready();
    let arguments = [ready.endpoint.as_str(), ready.ca.to_str().unwrap(), ready.key.as_str()];
    let output = python::run(python::with_openai(), PROGRAM, &arguments);
    assert!(output.success, "{}\n{}", output.stdout, output.stderr);
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output.stdout))
}

#[test]
fn answers_have_the_form_number_and_probabilities_that_were_asked_for() {
    let _machine = izar_tests::exclusive();
    let cluster = Options::model("smollm2-135m", 1, 1).start();
    let out = program(&cluster);
    forms(&out);
    refusals(&out);
    several(&out);
    probabilities(&out);
    penalties(&cluster);
    cluster.finish(&[]);
}

fn parse(text: &Value) -> Value {
    let text = text.as_str().expect("a text");
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn check_person(person: &Value) {
    let keys: Vec<&String> = person.as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["name", "age", "languages"], "{person}");
    assert!(person["name"].as_str().is_some_and(|name| name.chars().count() <= 20), "{person}");
    assert!(person["age"].as_u64().is_some_and(|age| age <= 150), "{person}");
    let languages = person["languages"].as_array().expect("an array");
    assert!((1..=3).contains(&languages.len()), "{person}");
    assert!(languages.iter().all(|l| ["French", "German", "Chinese"].iter().any(|known| l == known)), "{person}");
}

fn forms(out: &Value) {
    for choice in out["schema"].as_array().unwrap() {
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        check_person(&parse(&choice["message"]["content"]));
    }
    assert_eq!(out["schema_streamed"], out["schema"][1]["message"]["content"], "the same seed, the same answer");
    let object = &out["object"];
    // A small model may not come to an end by itself; what it wrote is the beginning of an object all the same.
    assert!(object["message"]["content"].as_str().unwrap().starts_with('{'), "{object}");
    if object["finish_reason"] == "stop" {
        assert!(parse(&object["message"]["content"]).is_object(), "{object}");
    }
    let regex = out["regex"].as_str().unwrap();
    let rest = regex.strip_prefix("Yes, ").or(regex.strip_prefix("No, ")).unwrap_or_else(|| panic!("{regex}"));
    let words = rest.strip_suffix('.').unwrap_or_else(|| panic!("{regex}"));
    assert!((5..=20).contains(&words.len()) && words.bytes().all(|b| b == b' ' || b.is_ascii_lowercase()), "{regex}");
}

fn refusals(out: &Value) {
    let params = ["response_format", "response_format", "guided_regex", "logit_bias", "n"];
    for (refused, param) in out["refused"].as_array().unwrap().iter().zip(params) {
        assert_eq!(refused["param"], param, "{refused}");
        assert!(refused["message"].as_str().unwrap().contains(param), "{refused}");
    }
}

fn several(out: &Value) {
    let texts = out["several"].as_array().unwrap();
    assert_eq!(texts.len(), 3);
    assert!(texts.iter().any(|text| text != &texts[0]), "choices are drawn apart: {texts:?}");
    assert_eq!((&out["streamed"], &out["ends"]), (&out["several"], &json!(3)), "each choice streams what it is");
    let (usage, streamed) = (&out["several_usage"], &out["streamed_usage"]);
    assert!((3..=24).contains(&usage["completion_tokens"].as_u64().unwrap()), "{usage}");
    for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(usage[field], streamed[field], "{usage} {streamed}");
    }
    for choice in out["completions"].as_array().unwrap() {
        let logprobs = &choice["logprobs"];
        let tokens: String = logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        assert_eq!(choice["text"], tokens, "{choice}");
        let lengths =
            ["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(|f| logprobs[f].as_array().unwrap().len());
        assert_eq!(lengths, [4; 4], "{choice}");
        let top = logprobs["top_logprobs"][0].as_object().unwrap();
        assert!((2..=3).contains(&top.len()), "{choice}");
    }
}

fn probabilities(out: &Value) {
    let tokens = out["scored"].as_array().unwrap();
    assert_eq!(out["scored_streamed"], out["scored"]);
    assert_eq!(out["scored_text"], out["plain"], "looking does not change the answer");
    let bytes: Vec<u8> =
        tokens.iter().flat_map(|t| t["bytes"].as_array().unwrap()).map(|b| b.as_u64().unwrap() as u8).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), out["scored_text"].as_str().unwrap());
    for token in tokens {
        let top: Vec<f64> =
            token["top_logprobs"].as_array().unwrap().iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert_eq!(top.len(), 5, "{token}");
        assert_eq!(token["logprob"].as_f64(), Some(top[0]), "greedy takes the most probable: {token}");
        assert!(top.windows(2).all(|pair| pair[0] >= pair[1]), "{token}");
        let together: f64 = top.iter().map(|logprob| logprob.exp()).sum();
        assert!(top[0] <= 0.0 && together <= 1.0 + 1e-5, "{token}");
    }
}

/// The model repeats itself when it is asked to, and penalties and biases keep it from it.
fn penalties(cluster: &Cluster) {
    let client = cluster.client();
    let ask = |more: Value| {
        let mut body = json!({"model": "smollm2-135m", "max_tokens": 60, "temperature": 0, "ignore_eos": true,
            "messages": [{"role": "user", "content": "Repeat the word apple again and again."}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let response = client.post(CHAT, &body).unwrap();
        assert_eq!(response.status, 200, "{}", response.text());
        response.content()
    };
    let most = |text: &str| {
        let words: Vec<&str> = text.split_whitespace().collect();
        words.iter().map(|word| words.iter().filter(|other| *other == word).count()).max().unwrap_or(0)
    };
    let plain = ask(json!({}));
    for more in [json!({"frequency_penalty": 2}), json!({"repetition_penalty": 1.8, "presence_penalty": 1})] {
        let other = ask(more.clone());
        assert!(most(&other) < most(&plain), "{more}: {other} | {plain}");
    }
}
