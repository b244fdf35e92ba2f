//! Chat templates: Jinja as Hugging Face's `apply_chat_template` runs it, with the functions that templates use.
//!
//! A template comes with the model and is a program: it gets a budget of steps and no access to anything.

use std::borrow::Cow;

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;

use super::Error;
use crate::chat::{Message, Role};

/// The template's name in minijinja's messages.
const NAME: &str = "chat_template";
/// Steps that one rendering may take; a conversation of 1,000 messages takes about 50,000.
const FUEL: u64 = 20_000_000;

/// A compiled template.
pub(super) struct Template {
    environment: Environment<'static>,
    bos: Option<String>,
    eos: Option<String>,
}

/// What a template sees of a message.
#[derive(Serialize)]
struct Shown<'a> {
    role: &'static str,
    content: Cow<'a, str>,
}

/// Marks the errors that a template raises by intent.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

impl Template {
    pub(super) fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
        });
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source.to_owned()).map_err(|e| Error::Template(e.to_string()))?;
        Ok(Self { environment, bos: bos.map(str::to_owned), eos: eos.map(str::to_owned) })
    }

    /// Renders the messages, ready for the assistant's answer.
    pub(super) fn render<'a>(
        &self,
        messages: impl Iterator<Item = (&'a Message, Cow<'a, str>)>,
        now_ms: u64,
    ) -> Result<String, Error> {
        let messages: Vec<Shown<'a>> =
            messages.map(|(message, content)| Shown { role: role(message.role), content }).collect();
        let strftime_now = move |format: &str| {
            strftime(format, now_ms).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e))
        };
        let text = |text: &Option<String>| text.as_deref().map_or(Value::UNDEFINED, Value::from);
        let values = context! {
            messages,
            add_generation_prompt => true,
            bos_token => text(&self.bos),
            eos_token => text(&self.eos),
            tools => Value::from(()),
            documents => Value::from(()),
            strftime_now => Value::from_function(strftime_now),
        };
        let template = self.environment.get_template(NAME).expect("it was added when this was built");
        template.render(values).map_err(explain)
    }
}

fn role(role: Role) -> &'static str {
    match role {
        Role::System | Role::Developer => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

/// Tells what the template refuses from what is wrong with it.
fn explain(error: minijinja::Error) -> Error {
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        if cause.is::<Raised>() {
            return Error::Refused(error.detail().unwrap_or_default().to_owned());
        }
        source = cause.source();
    }
    Error::Template(error.to_string())
}

/// `tojson` as Hugging Face defines it: Python's `json.dumps` with `ensure_ascii=False`, nothing escaped for HTML.
fn to_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<usize>>("indent")?,
    };
    // Python's other options; the ones that templates name have the values that are used here anyway.
    let _: Option<Value> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let result = match indent {
        // More than this is never meant.
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)),
    };
    result.map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("cannot serialize to JSON: {e}")))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// Writes `", "` and `": "` as Python does.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Formats a time (UTC) with the directives of Python's `strftime` that chat templates use.
fn strftime(format: &str, now_ms: u64) -> Result<String, String> {
    let seconds = now_ms / 1000;
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let month_name = MONTHS[month as usize - 1];
    let weekday = WEEKDAYS[(seconds / 86_400 % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        out += &match directive {
            Some('Y') => format!("{year:04}"),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('H') => format!("{hour:02}"),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('b') => month_name[..3].to_owned(),
            Some('B') => month_name.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('%') => "%".to_owned(),
            _ => return Err(format!("strftime_now does not know %{}", directive.map_or(String::new(), String::from))),
        };
    }
    Ok(out)
}

/// Year, month and day of a day counted from 1970-01-01.
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-24 09:05:07 UTC, a Tuesday.
    const NOW_MS: u64 = 1_795_511_107_000;

    fn render(source: &str, messages: &[(Role, &str)]) -> Result<String, Error> {
        let messages: Vec<Message> =
            messages.iter().map(|(role, content)| Message { role: *role, content: (*content).to_owned() }).collect();
        let shown = messages.iter().map(|m| (m, Cow::Borrowed(m.content.as_str())));
        Template::new(source, Some("<s>"), None)?.render(shown, NOW_MS)
    }
    fn check(source: &str, messages: &[(Role, &str)], expected: &str) {
        assert_eq!(render(source, messages).unwrap(), expected);
    }

    #[test]
    fn messages_and_tokens_are_shown_and_developers_speak_as_system() {
        check(
            "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{% endfor %}{{ eos_token }}",
            &[(Role::Developer, "be brief"), (Role::User, "<b>")],
            "<s>[system]be brief[user]<b>",
        );
    }

    #[test]
    fn blocks_are_trimmed_and_python_methods_work() {
        check(
            "{% for m in messages %}\n  {% if true %}\n{{ m.content.strip().upper() }}\n  {% endif %}\n{% endfor %}",
            &[(Role::User, " a "), (Role::User, "b")],
            "A\nB\n",
        );
        check(
            "{%- for m in messages -%}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{%- endfor -%}",
            &[(Role::User, "a"), (Role::User, "b")],
            "a",
        );
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        check("{{ messages | tojson }}", &[(Role::User, "é<")], r#"[{"role": "user", "content": "é<"}]"#);
        check("{{ [1] | tojson(indent=2) }}", &[], "[\n  1\n]");
    }

    #[test]
    fn the_date_is_the_one_given() {
        check("{{ strftime_now('%d %b %Y') }}", &[], "24 Nov 2026");
        check("{{ strftime_now('%A %B %Y-%m-%d %H:%M:%S %a %%') }}", &[], "Tuesday November 2026-11-24 09:05:07 Tue %");
        let error = render("{{ strftime_now('%Q') }}", &[]).unwrap_err().to_string();
        assert!(error.contains("%Q"), "{error}");
        assert_eq!((date(0), date(11_016), date(19_782)), ((1970, 1, 1), (2000, 2, 29), (2024, 2, 29)));
    }

    #[test]
    fn a_refusal_is_told_from_a_broken_template() {
        let refused = render("{{ raise_exception('roles must alternate') }}", &[]);
        assert!(matches!(refused, Err(Error::Refused(why)) if why == "roles must alternate"));
        let broken = render("{{ nothing.at.all }}", &[]).unwrap_err().to_string();
        assert!(broken.contains("chat_template:1"), "{broken}");
        assert!(matches!(render("{% for %}", &[]), Err(Error::Template(_))));
    }

    #[test]
    fn a_template_without_end_runs_out_of_steps() {
        let source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert!(matches!(render(source, &[]), Err(Error::Template(_))));
    }
}
