//! Takes out of a text what looks like a secret: what follows a name that sounds like one, API keys and bearer tokens,
//! private keys, passwords in addresses, and 64 hexadecimal digits that nothing says to be a hash. Pure.
//!
//! It errs on the side of taking out too much in texts that people and scripts write: what follows a secret's name is gone
//! to the end of its quotes, its brackets or its line. Names, paths and counts stay.

const GONE: &str = "(redacted)";
/// A setting whose name holds one of these has a secret for a value, unless that is a path.
const NAMES: [&str; 8] = ["secret", "password", "passwd", "passphrase", "token", "apikey", "api_key", "authorization"];
/// Where paths begin. Others are taken for secrets: one of 64 in base64 begins with a slash.
const ROOTS: [&str; 12] =
    ["/etc/", "/var/", "/run/", "/srv/", "/opt/", "/usr/", "/home/", "/root/", "/tmp/", "/mnt/", "/data/", "/dev/"];
/// What our own keys begin with.
const OUR_KEY: &str = "sk-izar-";
/// A number after a name with this is how many there were.
const COUNTED: &str = "token";
/// The keys of JSON that hold hashes of public things, as the listings show them.
const HASHES: [&str; 3] = ["revision", "hash", "digest"];
/// Digits of a key file.
const KEY_DIGITS: usize = 64;
/// What ends a value without quotes that may stay.
const ENDS: [char; 8] = [' ', '\t', '\n', ',', ';', '}', ']', ')'];

/// Returns the text without what looks like a secret.
pub fn redact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // What hides all lines until it ends.
    let (mut in_key, mut open) = (false, None);
    for mut line in text.split_inclusive('\n') {
        if line.contains("-----BEGIN ") && line.contains("PRIVATE KEY") {
            in_key = true;
            out += GONE;
            out.push('\n');
        }
        if !in_key {
            if let Some(value) = &mut open {
                match end(value, line) {
                    Some(at) => line = &line[at..],
                    None => continue,
                }
            }
            open = self::line(line, &mut out);
        }
        if line.contains("-----END ") {
            in_key = false;
        }
    }
    out
}

/// A value that goes on over several lines.
enum Open {
    Quotes(&'static str),
    /// So many brackets are to be closed.
    Brackets(usize),
}

impl Open {
    /// The value that begins here, and the length of its beginning.
    fn begins(value: &str) -> Option<(Self, usize)> {
        let quotes = ["\"\"\"", "'''"].into_iter().find(|quotes| value.starts_with(quotes));
        match quotes {
            Some(quotes) => Some((Self::Quotes(quotes), quotes.len())),
            None => value.starts_with(['[', '{']).then_some((Self::Brackets(0), 0)),
        }
    }
}

/// Where in the text a value ends that began before.
fn end(open: &mut Open, text: &str) -> Option<usize> {
    let depth = match open {
        Open::Quotes(quotes) => return text.find(*quotes).map(|at| at + quotes.len()),
        Open::Brackets(depth) => depth,
    };
    let (mut quote, mut escaped) = (None, false);
    for (at, c) in text.char_indices() {
        match quote {
            Some(_) if escaped => escaped = false,
            Some('"') if c == '\\' => escaped = true,
            Some(q) if q == c => quote = None,
            Some(_) => {}
            None if c == '"' || c == '\'' => quote = Some(c),
            None if c == '[' || c == '{' => *depth += 1,
            None if c == ']' || c == '}' => {
                *depth = depth.saturating_sub(1);
                if *depth == 0 {
                    return Some(at + 1);
                }
            }
            None => {}
        }
    }
    None
}

/// Puts out what may be seen of a line; returns the value that goes on in the next one.
fn line(line: &str, out: &mut String) -> Option<Open> {
    let line = addresses(line);
    let hash = HASHES.iter().any(|key| line.trim_start().to_ascii_lowercase().starts_with(&format!("\"{key}\"")));
    let mut rest = &line[..];
    while let Some((at, name)) = named(rest) {
        *out += &words(&rest[..at], hash);
        rest = &rest[at..];
        if let Some((mut open, begun)) = Open::begins(rest) {
            *out += GONE;
            match end(&mut open, &rest[begun..]) {
                Some(at) => rest = &rest[begun + at..],
                None => return Some(open),
            }
            continue;
        }
        let quote = rest.chars().next().filter(|c| ['"', '\''].contains(c));
        let value = match quote {
            Some(quote) => quoted(rest, quote),
            None => Some(&rest[..rest.find(ENDS).unwrap_or(rest.len())]),
        };
        match value {
            Some(value) if public(value, &name) => *out += value,
            Some(value) if quote.is_some() => {
                let quote = &value[..1];
                *out += &format!("{quote}{GONE}{quote}");
            }
            _ => {
                *out += GONE;
                rest = if rest.ends_with('\n') { "\n" } else { "" };
                break;
            }
        }
        rest = &rest[value.map_or(0, str::len)..];
    }
    *out += &words(rest, hash);
    None
}

/// Finds a secret's name with `=` or `:` behind it; returns where the value begins, and the name.
fn named(text: &str) -> Option<(usize, String)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let lower = text.to_ascii_lowercase();
    let mut rest = &lower[..];
    while let Some(start) = rest.find(is_name) {
        rest = &rest[start..];
        let (name, after) = rest.split_at(rest.find(|c| !is_name(c)).unwrap_or(rest.len()));
        rest = after;
        // As headers write it, too.
        let name = name.replace('-', "_");
        if NAMES.iter().any(|secret| name.contains(secret)) {
            let value = after.trim_start_matches(['"', '\'', '\\', ' ', '\t']);
            if value.starts_with(['=', ':']) {
                let value = value.trim_start_matches(['=', ':', '>', ' ', '\t']);
                return Some((text.len() - value.len(), name));
            }
        }
    }
    None
}

/// The quoted string at the beginning of a text, with its quotes; `None` if it does not end here.
fn quoted(text: &str, quote: char) -> Option<&str> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' if quote == '"' => escaped = true,
            c if c == quote => {
                let (value, after) = text.split_at(at + 1);
                // A shell goes on with what stands right behind it.
                return (after.is_empty() || after.starts_with(ENDS)).then_some(value);
            }
            _ => {}
        }
    }
    None
}

/// Values that say nothing: paths, counts, and what JSON has for no value.
fn public(value: &str, name: &str) -> bool {
    let bare = value.trim_matches(['"', '\'']);
    let count = name.contains(COUNTED) && value.parse::<f64>().is_ok();
    count || is_path(bare) || ["null", "true", "false", ""].contains(&bare)
}

fn is_path(value: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    ROOTS.iter().any(|root| value.starts_with(root)) && value.chars().all(plain)
}

/// The length of an escape at the beginning of a text, as JSON writes a line's end inside a string: what follows it is a
/// word of its own.
fn escape(text: &str) -> Option<usize> {
    let after = text.strip_prefix('\\')?;
    match after.chars().next()? {
        'u' => (after.len() >= 5 && after.is_char_boundary(5)).then_some(6),
        c => "nrtbf\"\\/".contains(c).then_some(2),
    }
}

/// Takes user and password out of addresses.
fn addresses(line: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(line.len()), line);
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out += before;
        let host = after.find(|c: char| c.is_whitespace() || "/\"'<>".contains(c)).unwrap_or(after.len());
        rest = match after[..host].rfind('@') {
            Some(user) => {
                out += GONE;
                &after[user..]
            }
            None => after,
        };
    }
    out + rest
}

/// Takes out the words that are secrets by themselves. `hash`: what has a key's digits is public here.
fn words(text: &str, hash: bool) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    let mut bearer = false;
    while let Some(c) = rest.chars().next() {
        if !is_word(c) {
            let (sign, after) = rest.split_at(escape(rest).unwrap_or(c.len_utf8()));
            out.push_str(sign);
            rest = after;
            continue;
        }
        let mut word = &rest[..rest.find(|c| !is_word(c)).unwrap_or(rest.len())];
        if bearer {
            // A token may hold any sign but those that end a value.
            word = &rest[..rest.find(|c: char| c.is_whitespace() || "\"',;".contains(c)).unwrap_or(rest.len())];
        }
        let digits = word.len() == KEY_DIGITS && word.bytes().all(|b| b.is_ascii_hexdigit());
        let secret = word.starts_with("sk-") || word.contains(OUR_KEY) || (digits && !hash) || bearer;
        out += if secret { GONE } else { word };
        bearer = word.eq_ignore_ascii_case("bearer");
        rest = &rest[word.len()..];
    }
    out
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
        check("# password = \"hunter2\"\n", "# password = \"(redacted)\"\n");
        check("12:00:00 login password=hunter2, user=bob\n", "12:00:00 login password=(redacted)\n");
        check("{\"a\": 1, \"token\": \"x.y/z\"}\n", "{\"a\": 1, \"token\": \"(redacted)\"}\n");
        check("password = \"hunter2\"\nnode = \"c1\"\n", "password = \"(redacted)\"\nnode = \"c1\"\n");
        check(&format!("pepper {digits}.\n"), "pepper (redacted).\n");
        let pem = "a\n-----BEGIN PRIVATE KEY-----\nMIIC\n-----END PRIVATE KEY-----\nb\n";
        check(pem, "a\n(redacted)\nb\n");
    }

    #[test]
    fn a_secret_is_known_by_its_name_wherever_that_stands() {
        check("labels = { hf_token = \"hf_abcDEF\" }\n", "labels = { hf_token = \"(redacted)\" }\n");
        let logged = "2026-11-27T12:00:00 host x: password = ";
        check(&format!("{logged}hunter2\n"), &format!("{logged}(redacted)\n"));
        check("Authorization: Basic dXNlcjpwYXNz\n", "Authorization: (redacted)\n");
        check("{\"token\" : \"x9\"}\n", "{\"token\" : \"(redacted)\"}\n");
        check("{\"a\": \"{\\\"token\\\":\\\"x9\\\"}\"}", "{\"a\": \"{\\\"token\\\":(redacted)");
        check("password=correct horse\nb\n", "password=(redacted)\nb\n");
        check("password = \"a\\\"b\" # c\n", "password = \"(redacted)\" # c\n");
        check("password='it'\\''s' x\n", "password=(redacted)\n");
        check("password = \"12345\"\nsecret = 12\n", "password = \"(redacted)\"\nsecret = (redacted)\n");
        check("password = \"no end\nb\n", "password = (redacted)\nb\n");
        check("http_proxy=http://bob:hunter2@proxy\n", "http_proxy=http://(redacted)@proxy\n");
        check("see https://a.b/c and http://u:p@d@e/f@g", "see https://a.b/c and http://(redacted)@e/f@g");
    }

    #[test]
    fn what_only_looks_like_a_path_is_taken_out() {
        check("AWS_SECRET_ACCESS_KEY=/wJalrXUtnFEMI/K7MDENG\n", "AWS_SECRET_ACCESS_KEY=(redacted)\n");
        check("secret = \".x9\"\npassword=/etc/a+b=\n", "secret = \"(redacted)\"\npassword=(redacted)\n");
        check("passphrase: x y\nX-Api-Key: abc\n", "passphrase: (redacted)\nX-Api-Key: (redacted)\n");
    }

    #[test]
    fn what_stands_behind_an_escape_is_a_word_of_its_own() {
        let digits = "0a".repeat(32);
        check("\"said: a\\nsk-izar-AbC\\n\"", "\"said: a\\n(redacted)\\n\"");
        check(&format!("\"x\\n{digits}\\u000a{digits}\""), "\"x\\n(redacted)\\u000a(redacted)\"");
        check("prefix_sk-izar-AbC", "(redacted)");
        check("C:\\dir \\u1 \\", "C:\\dir \\u1 \\");
    }

    #[test]
    fn a_secret_of_several_lines_is_hidden_until_it_ends() {
        check("tokens = [\n  \"a]b\",\n  \"c\"\n]\nnode = 1\n", "tokens = (redacted)\nnode = 1\n");
        check("secrets = { a = [1], b = 2 }\nc\n", "secrets = (redacted)\nc\n");
        check("\"token\": {\n\"a\": [\n1]\n},\n\"b\": 1\n", "\"token\": (redacted),\n\"b\": 1\n");
        for quotes in ["'''", "\"\"\""] {
            let text = format!("password = {quotes}\nhunter2\n{quotes}\nb\n");
            check(&text, "password = (redacted)\nb\n");
            check(&format!("password = {quotes}x{quotes} # b\n"), "password = (redacted) # b\n");
        }
    }

    #[test]
    fn what_support_needs_stays() {
        let digits = "0a".repeat(32);
        let hash = format!("  \"revision\": \"{digits}\",\n");
        for text in [
            "[secrets]\npepper = \"/etc/izar/pepper\"\nmaster_key = \"master.key\"\n",
            "\"prompt_tokens\": 31,\n",
            "{\"prompt_tokens\": 31, \"token\": null, \"b\": 1}\n",
            "2026-11-27T12:00:00 c1 a step; tokens=5 ms=7 at https://c1:8443/x\n",
            "api_key_file = \"/etc/izar/pki/api.key\"\n",
            "izar_tokens_total{agent=\"a1\"} 7\n",
            &hash,
            "",
        ] {
            check(text, text);
        }
    }
}
