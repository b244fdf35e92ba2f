//! Where the programs under test lie: beside the test itself, in `target/<profile>`.

use std::path::PathBuf;

/// Returns the path of `izar`, `izar-controller` or `izar-agent`. Panics, saying what to do, if it was not built.
pub fn path(name: &str) -> PathBuf {
    let path = profile_folder().join(name);
    assert!(path.exists(), "{} is not there: run `cargo build --release` first", path.display());
    path
}

/// Returns `target/<profile>`: where `chaos` lies, and above where tests do (`deps/stories-<hash>`).
fn profile_folder() -> PathBuf {
    let own = std::env::current_exe().expect("a process knows its own file");
    let folder = own.parent().expect("a file lies in a folder");
    let folder =
        if folder.ends_with("deps") { folder.parent().expect("cargo puts deps into the profile") } else { folder };
    folder.to_owned()
}

/// Returns the folder that holds everything built, `target`: what tests download is kept there.
pub fn target_folder() -> PathBuf {
    profile_folder().parent().expect("a profile lies in the target folder").to_owned()
}

/// Returns the root of the repository.
pub fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the repository").to_owned()
}
