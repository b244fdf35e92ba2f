//! Whether a credential that a daemon's file names is given by its unit, lies where systemd looks for it and opens on this
//! machine: without it the daemon does not start. Only root can open one.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Finding;

/// Where systemd looks for a credential's file that has no folder of its own (systemd.exec(5), `LoadCredential=`); for an
/// encrypted one first in the folders of the same names with `.encrypted`.
const STORES: [&str; 4] = ["/etc/credstore", "/run/credstore", "/usr/local/lib/credstore", "/usr/lib/credstore"];

/// What came of opening an encrypted credential; `None` where that cannot be tried.
type Opened = Option<Result<(), String>>;

/// Opens a credential on this machine, as root alone can.
fn open(name: &str, file: &Path) -> Opened {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let mut opener = Command::new("systemd-creds");
    // What is in it goes nowhere.
    opener.arg("decrypt").arg(format!("--name={name}")).arg(file).arg("-").stdin(Stdio::null());
    let output = opener.stdout(Stdio::null()).stderr(Stdio::piped()).output().ok()?;
    let said = String::from_utf8_lossy(&output.stderr);
    Some(if output.status.success() { Ok(()) } else { Err(said.trim().to_owned()) })
}

/// Looks for the credential `name` of a unit.
pub fn given(check: &str, unit: &str, name: &str) -> Finding {
    let asked = Command::new("systemctl").args(["cat", unit]).output().ok().filter(|output| output.status.success());
    let text = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    judge(check, unit, name, text.as_deref(), |file| file.metadata().map(drop), |file| open(name, file))
}

/// The same, from the unit's text, if there is one, and what becomes of a look at a file and of opening it.
fn judge(
    check: &str,
    unit: &str,
    name: &str,
    text: Option<&str>,
    look: impl Fn(&Path) -> io::Result<()>,
    open: impl Fn(&Path) -> Opened,
) -> Finding {
    let unseen = |why: &str| Finding::ok(check, format!("the credential {name}, not looked at: {why}"));
    let again = |place: &Path| format!("systemd-creds encrypt --name={name} KEY {} (docs/systemd.md)", place.display());
    let Some(text) = text else { return unseen(&format!("systemd knows no {unit} here")) };
    let Some(Source { file, encrypted }) = source(text, name) else {
        if text.contains("SetCredential") || text.contains("ImportCredential") {
            return unseen("the unit sets or imports credentials");
        }
        let mend = format!("add LoadCredentialEncrypted={name}:FILE to it (systemctl edit {unit})");
        return Finding::failure(check, format!("{unit} is not given the credential {name}"), mend);
    };
    let sealed = STORES.iter().filter(|_| encrypted).map(|store| format!("{store}.encrypted"));
    let stores = sealed.chain(STORES.map(str::to_owned));
    let places: Vec<PathBuf> = stores.map(|store| Path::new(&store).join(file)).collect();
    let mut unreadable = None;
    for place in &places {
        match look(place) {
            Ok(()) => {
                let found = format!("the credential {name} lies at {}", place.display());
                return match encrypted.then(|| open(place)).flatten() {
                    None => Finding::ok(check, found),
                    Some(Ok(())) => Finding::ok(check, format!("{found}, and opens")),
                    Some(Err(why)) => {
                        let found = format!("{found}, but does not open, and {unit} does not start: {why}");
                        Finding::failure(check, found, again(place))
                    }
                };
            }
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
    let found = format!("the credential {name} does not lie at {}, and {unit} does not start", places[0].display());
    Finding::failure(check, found, again(&places[0]))
}

/// What a unit has for a credential.
struct Source<'a> {
    file: &'a str,
    encrypted: bool,
}

/// The last line about a credential counts.
fn source<'a>(text: &'a str, name: &str) -> Option<Source<'a>> {
    let source = |line: &'a str| {
        let (key, value) = line.trim().split_once('=')?;
        let (id, file) = value.split_once(':').unwrap_or((value, value));
        let encrypted = key == "LoadCredentialEncrypted";
        ((encrypted || key == "LoadCredential") && id == name).then_some(Source { file, encrypted })
    };
    text.lines().filter_map(source).next_back()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    const UNIT: &str = "[Service]\nLoadCredentialEncrypted=master-key:izar.master-key\nLoadCredential=pepper\n";

    /// What is said of a credential when these files are there, a look elsewhere ends so, and what is opened so.
    fn told(name: &str, text: Option<&str>, there: &[&str], elsewhere: ErrorKind, opens: Opened) -> Finding {
        let look = |path: &Path| match there.iter().any(|file| Path::new(file) == path) {
            true => Ok(()),
            false => Err(elsewhere.into()),
        };
        judge("c", "u", name, text, look, |_| opens.clone())
    }

    fn check(name: &str, text: Option<&str>, there: &[&str], elsewhere: ErrorKind) -> (Verdict, String) {
        let finding = told(name, text, there, elsewhere, None);
        (finding.verdict, finding.found)
    }

    #[test]
    fn an_encrypted_credential_must_open_here() {
        let there: &[&str] = &["/etc/credstore.encrypted/izar.master-key", "/etc/credstore/pepper"];
        let check = |name, opens| told(name, Some(UNIT), there, ErrorKind::NotFound, opens);
        let opened = check("master-key", Some(Ok(())));
        assert!(opened.verdict == Verdict::Ok && opened.found.ends_with(", and opens"), "{opened:?}");
        let sealed = check("master-key", Some(Err("Bad message".into())));
        assert!(sealed.is_failure() && sealed.found.ends_with("Bad message"), "{sealed:?}");
        assert!(sealed.mend.unwrap().contains("--name=master-key KEY /etc/credstore.encrypted/izar.master-key"));
        assert_eq!(check("pepper", Some(Err("it is plain".into()))).verdict, Verdict::Ok, "it lies in the clear");
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
        assert_eq!(at("pepper", "/etc/credstore.encrypted/pepper").0, Verdict::Failure, "it would be given as it is");
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
