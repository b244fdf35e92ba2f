//! The real `openai` package of Python, unmodified: what it was written for works, and it raises its own exceptions.

use izar_tests::client::Client;
use izar_tests::nodes::Site;
use izar_tests::python;
use serde_json::{Value, json};

/// Takes the endpoint, the CA, a key and the name of what to do; prints one JSON object.
const PROGRAM: &str = r#"
import json, sys, httpx, openai, ssl

endpoint, ca, key, what = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
def client(key):
    return openai.OpenAI(base_url=endpoint + "/v1", api_key=key, max_retries=0, http_client=httpx.Client(verify=context))
api = client(key)
question = [{"role": "user", "content": "What is the capital of France?"}]

def raised(call):
    try:
        call()
    except openai.APIStatusError as error:
        return {"class": type(error).__name__, "status": error.status_code, "message": str(error),
                "param": error.param, "request_id": error.request_id,
                "retry_after": error.response.headers.get("retry-after")}
    return {"class": None}

def ask(**more):
    return api.chat.completions.create(**{"model": "slow", "messages": question, "max_tokens": 8, "seed": 3, **more})

def stream(**more):
    return api.chat.completions.create(
        **{"model": "slow", "messages": question, "max_tokens": 8, "seed": 3, "stream": True,
           "stream_options": {"include_usage": True}, **more})

out = {}
if what == "answers":
    whole = ask()
    out["whole"] = whole.choices[0].message.content
    out["finish"] = whole.choices[0].finish_reason
    out["usage"] = whole.usage.model_dump()
    pieces, usage = [], None
    for chunk in stream():
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
        if chunk.usage:
            usage = chunk.usage.model_dump()
    out["pieces"], out["stream_usage"] = pieces, usage
    out["models"] = [model.id for model in api.models.list()]
    completion = api.completions.create(model="slow", prompt="Once", max_tokens=3)
    out["completion"] = completion.choices[0].text
elif what == "errors":
    out["400"] = raised(lambda: ask(temperature=9))
    out["401"] = raised(lambda: client("sk-wrong").models.list())
    out["404"] = raised(lambda: ask(model="gpt-9"))
elif what == "429":
    running = stream(max_tokens=100)
    next(iter(running))
    out["429"] = raised(lambda: ask())
    running.close()
elif what == "503":
    out["503"] = raised(lambda: ask())
print(json.dumps(out))
"#;

fn run(client: &Client, site: &Site, key: &str, what: &str) -> Value {
    let endpoint = format!("https://{}", client.address());
    let ca = site.pki().join("ca.pem");
    let output = python::run(python::with_openai(), PROGRAM, &[&endpoint, ca.to_str().unwrap(), key, what]);
    assert!(output.success, "{what}: {}\n{}", output.stdout, output.stderr);
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{what}: {error}: {}", output.stdout))
}

#[test]
fn the_real_openai_client_gets_answers_and_its_own_exceptions() {
    let _machine = izar_tests::exclusive();
    let mut site = Site::new(1, false);
    site.start_controllers();
    let admin = site.admin(1);
    admin.deploy_echo("slow", 1, 5, 20);
    let key = admin.create_key(&[]).unwrap();
    let client = site.client(1, Some(&key));

    let early = run(&client, &site, &key, "503");
    check_exception(&early["503"], "InternalServerError", 503);
    assert!(early["503"]["retry_after"].is_string());
    site.start_agent("a1");
    site.admin(1).wait_ready("slow", 1);

    let answers = run(&client, &site, &key, "answers");
    let pieces: Vec<&str> = answers["pieces"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(answers["whole"], pieces.concat(), "{answers}");
    assert!(pieces.len() > 1 && answers["finish"] == "length", "{answers}");
    assert_eq!(answers["usage"]["completion_tokens"], 8, "{answers}");
    assert_eq!(answers["usage"]["total_tokens"], answers["stream_usage"]["total_tokens"], "{answers}");
    assert_eq!(answers["models"], json!(["slow"]));
    assert!(!answers["completion"].as_str().unwrap().is_empty());

    let errors = run(&client, &site, &key, "errors");
    check_exception(&errors["400"], "BadRequestError", 400);
    assert_eq!(errors["400"]["param"], "temperature");
    check_exception(&errors["401"], "AuthenticationError", 401);
    check_exception(&errors["404"], "NotFoundError", 404);
    let single = site.admin(1).create_key(&["--max-concurrent", "1"]).unwrap();
    let busy = run(&client, &site, &single, "429");
    check_exception(&busy["429"], "RateLimitError", 429);
    assert!(busy["429"]["retry_after"].is_string());
    site.finish(&[]);
}

fn check_exception(raised: &Value, class: &str, status: u64) {
    assert_eq!((raised["class"].as_str(), raised["status"].as_u64()), (Some(class), Some(status)), "{raised}");
    assert!(raised["request_id"].is_string(), "{raised}");
}
