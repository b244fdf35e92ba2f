//! Takes out of a text what looks like a secret: API keys and bearer tokens, private keys, values of settings that are
//! named like secrets, and 64 hexadecimal digits that nothing says to be a hash. Pure.
//!
//! It errs on the side of taking out too much in texts that people and scripts write; names, paths and numbers stay.

const GONE: &str = "(redacted)";
/// A setting whose name holds one of these has a secret for a value, unless that is a path.
const NAMES: [&str; 7] = ["secret", "password", "passwd", "token", "apikey", "api_key", "authorization"];
/// The keys of JSON that hold hashes of public things, as the listings show them.
const HASHES: [&str; 3] = ["revision", "hash", "digest"];
/// Digits of a key file.
const KEY_DIGITS: usize = 64;

/// Returns the text without what looks like a secret.
pub fn redact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_key = false;
    for line in text.split_inclusive('\n') {
        if line.contains("-----BEGIN ") && line.contains("PRIVATE KEY") {
            in_key = true;
            out += GONE;
            out.push('\n');
        }
        if !in_key {
            out += &self::line(line);
        }
        if line.contains("-----END ") {
            in_key = false;
        }
    }
    out
}

fn line(line: &str) -> String {
    let lower = line.to_ascii_lowercase();
    if let Some(at) = lower.find(['=', ':']) {
        let (name, value) = (&lower[..at], line[at + 1..].trim());
        // The name of a setting is the word before; a whole line is its value.
        let name = name.split_whitespace().last().unwrap_or_default().trim_matches('"');
        let word = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
        if word && named_like_a_secret(name) && !public(value.trim_matches([',', '"', '\''])) {
            let end = if line.ends_with('\n') { "\n" } else { "" };
            return format!("{} {GONE}{end}", &line[..=at]);
        }
    }
    let hash = HASHES.iter().any(|key| lower.trim_start().starts_with(&format!("\"{key}\"")));
    let (mut out, mut rest) = (String::new(), line);
    // What the words before say of the next one.
    let (mut named, mut hidden) = (false, false);
    while let Some(c) = rest.chars().next() {
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if !is_word(c) {
            hidden |= named && (c == '=' || c == ':');
            named &= c == '"';
            hidden &= c != '/' || !out.ends_with(['=', '"', ' ']);
            out.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        }
        let mut word = &rest[..rest.find(|c| !is_word(c)).unwrap_or(rest.len())];
        if hidden {
            // A token may hold any sign but those that end a value.
            word = &rest[..rest.find(|c: char| c.is_whitespace() || "\"',;".contains(c)).unwrap_or(rest.len())];
        }
        let digits = word.len() == KEY_DIGITS && word.bytes().all(|b| b.is_ascii_hexdigit());
        let bearer = word.eq_ignore_ascii_case("bearer");
        let secret = word.starts_with("sk-") || (digits && !hash) || (hidden && !bearer && !public(word));
        out += if secret { GONE } else { word };
        (named, hidden) = (named_like_a_secret(&word.to_ascii_lowercase()), bearer);
        rest = &rest[word.len()..];
    }
    out
}

fn named_like_a_secret(name: &str) -> bool {
    NAMES.iter().any(|secret| name.contains(secret))
}

/// Values that say nothing: paths, numbers, and what JSON has for no value.
fn public(value: &str) -> bool {
    value.starts_with(['/', '.'])
        || value.parse::<f64>().is_ok()
        || ["null", "true", "false", "", "[", "{"].contains(&value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        assert_eq!(redact(text), expected);
    }

    #[test]
    fn what_looks_like_a_secret_is_taken_out() {
        let digits = "0a".repeat(32);
        check("key sk-izar-AbC_9-x failed\n", "key (redacted) failed\n");
        check("Authorization: Bearer abc.def\n", "Authorization: (redacted)\n");
        check("sent bearer abcdef, then left", "sent bearer (redacted), then left");
        check("# password = \"hunter2\"\n", "# password = (redacted)\n");
        check("12:00:00 login password=hunter2, user=bob\n", "12:00:00 login password=(redacted), user=bob\n");
        check("{\"a\": 1, \"token\": \"x.y/z\"}\n", "{\"a\": 1, \"token\": \"(redacted)\"}\n");
        check("password = \"hunter2\"\nnode = \"c1\"\n", "password = (redacted)\nnode = \"c1\"\n");
        check(&format!("pepper {digits}.\n"), "pepper (redacted).\n");
        let pem = "a\n-----BEGIN PRIVATE KEY-----\nMIIC\n-----END PRIVATE KEY-----\nb\n";
        check(pem, "a\n(redacted)\nb\n");
    }

    #[test]
    fn what_support_needs_stays() {
        let digits = "0a".repeat(32);
        let hash = format!("  \"revision\": \"{digits}\",\n");
        for text in [
            "[secrets]\npepper = \"/etc/izar/pepper\"\nmaster_key = \"master.key\"\n",
            "\"prompt_tokens\": 31,\n",
            "api_key_file = \"/etc/izar/pki/api.key\"\n",
            "izar_tokens_total{agent=\"a1\"} 7\n",
            &hash,
            "",
        ] {
            check(text, text);
        }
    }
}
