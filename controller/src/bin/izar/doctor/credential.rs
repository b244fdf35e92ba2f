//! Whether a credential that a daemon's file names is given by its unit, and lies where systemd looks for it: without it the
//! daemon does not start. Whether it opens, only its start tells.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::process::Command;

use super::Finding;

/// Where systemd looks for a credential's file that has no folder of its own (systemd.exec(5), `LoadCredential=`).
const STORES: [&str; 8] = [
    "/etc/credstore.encrypted",
    "/run/credstore.encrypted",
    "/usr/local/lib/credstore.encrypted",
    "/usr/lib/credstore.encrypted",
    "/etc/credstore",
    "/run/credstore",
    "/usr/local/lib/credstore",
    "/usr/lib/credstore",
];

/// Looks for the credential `name` of a unit.
pub fn given(check: &str, unit: &str, name: &str) -> Finding {
    let asked = Command::new("systemctl").args(["cat", unit]).output().ok().filter(|output| output.status.success());
    let text = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    judge(check, unit, name, text.as_deref(), |path| path.metadata().map(drop))
}

/// The same, from the unit's text, if there is one, and what becomes of a look at a file.
fn judge(check: &str, unit: &str, name: &str, text: Option<&str>, look: impl Fn(&Path) -> io::Result<()>) -> Finding {
    let unseen = |why: &str| Finding::ok(check, format!("the credential {name}, not looked at: {why}"));
    let Some(text) = text else { return unseen(&format!("systemd knows no {unit} here")) };
    let Some(file) = source(text, name) else {
        if text.contains("SetCredential") || text.contains("ImportCredential") {
            return unseen("the unit sets or imports credentials");
        }
        let mend = format!("add LoadCredentialEncrypted={name}:FILE to it (systemctl edit {unit})");
        return Finding::failure(check, format!("{unit} is not given the credential {name}"), mend);
    };
    let places: Vec<_> = STORES.iter().map(|store| Path::new(store).join(file)).collect();
    let mut unreadable = None;
    for place in &places {
        match look(place) {
            Ok(()) => return Finding::ok(check, format!("the credential {name} lies at {}", place.display())),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Err(error) => unreadable = Some(format!("{}: {error}", place.display())),
        }
        if Path::new(file).is_absolute() {
            break;
        }
    }
    if let Some(why) = unreadable {
        return unseen(&format!("{why}; ask as root"));
    }
    let mend = format!("systemd-creds encrypt --name={name} KEY {} (docs/systemd.md)", places[0].display());
    let found = format!("the credential {name} does not lie at {}, and {unit} does not start", places[0].display());
    Finding::failure(check, found, mend)
}

/// The file that the unit has for a credential, as the last line about it says.
fn source<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let file = |line: &'a str| {
        let (key, value) = line.trim().split_once('=')?;
        let (id, file) = value.split_once(':').unwrap_or((value, value));
        (["LoadCredential", "LoadCredentialEncrypted"].contains(&key) && id == name).then_some(file)
    };
    text.lines().filter_map(file).next_back()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    const UNIT: &str = "[Service]\nLoadCredentialEncrypted=master-key:izar.master-key\nLoadCredential=pepper\n";

    /// What is said of a credential when these files are there, and a look elsewhere ends so.
    fn check(name: &str, text: Option<&str>, there: &[&str], elsewhere: ErrorKind) -> (Verdict, String) {
        let look = |path: &Path| match there.iter().any(|file| Path::new(file) == path) {
            true => Ok(()),
            false => Err(elsewhere.into()),
        };
        let finding = judge("c", "u", name, text, look);
        (finding.verdict, finding.found)
    }

    #[test]
    fn a_credential_is_looked_for_where_systemd_does() {
        let missing = ErrorKind::NotFound;
        let at = |name, file: &str| check(name, Some(UNIT), &[file], missing);
        assert_eq!(at("master-key", "/etc/credstore.encrypted/izar.master-key").0, Verdict::Ok);
        assert_eq!(at("master-key", "/usr/lib/credstore/izar.master-key").0, Verdict::Ok);
        let (verdict, found) = at("master-key", "/etc/credstore.encrypted/master-key");
        assert_eq!(verdict, Verdict::Failure);
        assert!(found.contains("/etc/credstore.encrypted/izar.master-key"), "{found}");
        assert_eq!(at("pepper", "/etc/credstore/pepper").0, Verdict::Ok);
        let later = format!("{UNIT}# drop-in\nLoadCredentialEncrypted=master-key:/srv/key\n");
        assert_eq!(check("master-key", Some(&later), &["/srv/key"], missing).0, Verdict::Ok);
        assert_eq!(check("master-key", Some(&later), &["/etc/credstore/key"], missing).0, Verdict::Failure);
        let (verdict, found) = check("api.key", Some(UNIT), &[], missing);
        assert_eq!((verdict, &*found), (Verdict::Failure, "u is not given the credential api.key"));
    }

    #[test]
    fn what_cannot_be_looked_at_is_said_and_no_failure() {
        for (text, kind) in [
            (None, ErrorKind::NotFound),
            (Some(UNIT), ErrorKind::PermissionDenied),
            (Some("SetCredential=master-key:x"), ErrorKind::NotFound),
        ] {
            let (verdict, found) = check("master-key", text, &[], kind);
            assert!(verdict == Verdict::Ok && found.contains("not looked at"), "{found}");
        }
    }
}
