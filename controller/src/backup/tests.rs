//! A backup from a store to a restored member, and everything that can be wrong with one.

use std::fs;
use std::path::Path;
use std::time::Duration;

use izar_common::id::Hash;
use izar_common::seal::MasterKey;

use super::archive::Reader;
use super::contents::{Contents, Maker};
use super::load::load;
use super::restore::{Restored, restore};
use super::*;
use crate::raft::rebuild::remains;
use crate::raft::{Member, Options};
use crate::state::State;
use crate::state::store::{Opened, Store};
use crate::state::tests::{registered, two_turns};

fn key() -> MasterKey {
    MasterKey::from_bytes([3; 32])
}

fn maker() -> Maker {
    Maker {
        cluster: "bank".parse().unwrap(),
        site: "east".parse().unwrap(),
        node: "c1".parse().unwrap(),
        now_ms: 1_795_521_600_000,
        nonce: 7,
    }
}

fn options(dir: &Path, node: &str) -> Options {
    let member = |id: u64| Member {
        id,
        node: format!("c{id}").parse().unwrap(),
        address: format!("127.0.0.1:{id}").parse().unwrap(),
    };
    Options {
        data_dir: dir.join(node),
        cluster: "bank".parse().unwrap(),
        site: "east".parse().unwrap(),
        node: node.parse().unwrap(),
        members: (1..=3).map(member).collect(),
        tick: Duration::from_millis(20),
        election_ticks: 10,
        heartbeat_ticks: 2,
    }
}

/// A store with a model, a key, a closed turn and an open one; its state, and a sealed backup of it.
fn backed_up(dir: &Path, weights: bool) -> (State, Vec<u8>) {
    let (state, contents) = lived(dir, weights);
    let (bytes, _) = contents.write(&contents.header(&maker(), &key()), &key(), Vec::new()).unwrap();
    (state, bytes)
}

/// The same, before it is written; of the model files one is damaged if it lies in `dir` already.
fn lived(dir: &Path, weights: bool) -> (State, Contents) {
    let (path, audit, site) = (dir.join("state.redb"), dir.join("audit"), "east".parse().unwrap());
    let Opened { mut store, mut state, .. } = Store::open(&path, &audit, &site, &[1, 2, 3]).unwrap();
    for write in two_turns(&mut state) {
        store.put(write);
    }
    fs::create_dir_all(dir.join("blobs")).unwrap();
    let [text, file] = [&b"a text"[..], b"weights"].map(|content| {
        let hash = izar_common::blob::hash(content);
        let path = dir.join("blobs").join(hash.to_string());
        if !path.exists() {
            fs::write(path, content).unwrap();
        }
        hash
    });
    store.put(registered(&mut state, text, file));
    store.flush().unwrap();
    let contents = Contents::of_cut(&site, store.reader().cut().unwrap()).unwrap();
    let contents = contents.with_files(weights, |hash: &Hash| dir.join("blobs").join(hash.to_string()));
    (state, contents)
}

fn verify(bytes: &[u8], key: &MasterKey) -> Result<load::Loaded, String> {
    let loaded = Reader::open(bytes, key).and_then(|reader| load(reader, |_| Ok(())));
    loaded.map_err(|error| format!("{error:#}"))
}

fn restored(bytes: &[u8], options: &Options) -> Result<Restored, String> {
    restore(bytes, &key(), options, None).map_err(|error| format!("{error:#}"))
}

#[test]
fn a_backup_holds_the_state_and_the_whole_trail_and_weights_only_if_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (state, bytes) = backed_up(dir.path(), false);
    let loaded = verify(&bytes, &key()).unwrap();
    assert_eq!(loaded.state.digest(), state.digest());
    assert_eq!((loaded.records, loaded.header.applied), (state.audit_seq(), state.applied()));
    let [model] = &loaded.models()[..] else { panic!("{:?}", loaded.models()) };
    assert!(model.text && !model.weights);
    assert_eq!(loaded.header.file_name(), format!("bank-east-20261124T120000Z-{}-c1.izarbak", state.applied()));
    assert_eq!(Header::of_prefix(&bytes).unwrap().as_ref(), Some(&loaded.header));
    assert_eq!(Header::of_prefix(&bytes[..20]).unwrap(), None);
    let other = tempfile::tempdir().unwrap();
    assert!(verify(&backed_up(other.path(), true).1, &key()).unwrap().models()[0].weights);
}

#[test]
fn nothing_of_it_can_be_read_or_changed_without_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let (_, bytes) = backed_up(dir.path(), false);
    assert!(!bytes.windows(6).any(|window| window == b"a text"));
    let said = verify(&bytes, &MasterKey::from_bytes([4; 32])).unwrap_err();
    assert!(said.contains("another master key") && said.contains("use the one that the cluster had"), "{said}");
    for at in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        assert!(verify(&bad, &key()).is_err(), "byte {at}");
        assert!(verify(&bytes[..at], &key()).is_err(), "cut at {at}");
    }
    let said = verify(&bytes[..bytes.len() - 1], &key()).unwrap_err();
    assert!(said.contains("cut off") && said.contains("take another"), "{said}");
    let said = verify(b"something else entirely", &key()).unwrap_err();
    assert!(said.contains("no backup"), "{said}");
    let json = String::from_utf8_lossy(&bytes[12..600]).into_owned();
    let newer = json.replacen("\"format\":1", "\"format\":2", 1);
    assert_ne!(json, newer);
    let newer = [&bytes[..12], newer.as_bytes()].concat();
    let said = verify(&newer, &key()).unwrap_err();
    assert!(said.contains("install a newer izar"), "{said}");
}

#[test]
fn every_member_that_is_restored_begins_alike_and_a_daemon_can_go_on_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let (state, bytes) = backed_up(dir.path(), false);
    let [one, other] = ["c1", "c2"].map(|node| {
        let options = options(dir.path(), node);
        let restored = restored(&bytes, &options).unwrap();
        (restored, remains(&options).unwrap())
    });
    assert_eq!(one.1.state.digest(), other.1.state.digest());
    assert_eq!((one.0.digest, one.0.incarnation, one.0.abandoned), (other.0.digest, state.incarnation() + 1, 1));
    assert_eq!(one.0.records, state.audit_seq() + 2, "a turn was closed, and the new life is recorded");
    let trail: Vec<u8> = one.1.segments.iter().flat_map(|segment| fs::read(&segment.path).unwrap()).collect();
    let seqs: Vec<u64> = crate::state::audit::decode(&trail).unwrap().iter().map(|record| record.seq).collect();
    assert_eq!(seqs, (1..=one.0.records).collect::<Vec<_>>());
    assert_eq!(fs::read_dir(dir.path().join("c1/blobs")).unwrap().count(), 1, "the model's text");
}

#[test]
fn a_restore_into_a_used_directory_or_of_another_cluster_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (_, bytes) = backed_up(dir.path(), false);
    let mine = options(dir.path(), "c1");
    let other = Options { cluster: "shop".parse().unwrap(), ..mine.clone() };
    let said = restored(&bytes, &other).unwrap_err();
    assert!(said.contains("cluster bank") && said.contains("cluster shop"), "{said}");
    assert!(!mine.data_dir.exists());
    assert!(restore(&bytes[..], &key(), &mine, Some(1)).is_err(), "a life that was there");
    let said = restore(&bytes[..], &key(), &mine, Some(u64::MAX)).unwrap_err().to_string();
    assert!(said.contains("take the next number") && !mine.data_dir.exists(), "{said}");
    restored(&bytes, &mine).unwrap();
    let said = restored(&bytes, &mine).unwrap_err();
    assert!(said.contains("is not empty"), "{said}");
}

#[test]
fn a_damaged_backup_never_becomes_a_member() {
    let dir = tempfile::tempdir().unwrap();
    let (_, bytes) = backed_up(dir.path(), false);
    let mine = options(dir.path(), "c1");
    restored(&bytes[..bytes.len() - 1], &mine).unwrap_err();
    assert!(remains(&mine).is_err());
    assert!(restored(&bytes, &mine).unwrap_err().contains("broke off"));
}

#[test]
fn a_damaged_text_is_left_out_and_said_and_a_damaged_trail_makes_no_backup() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("blobs")).unwrap();
    fs::write(dir.path().join("blobs").join(izar_common::blob::hash(b"a text").to_string()), "a tex?").unwrap();
    let (state, bytes) = backed_up(dir.path(), true);
    let loaded = verify(&bytes, &key()).unwrap();
    assert_eq!((loaded.header.damaged_files, loaded.state.digest()), (1, state.digest()));
    assert!(!loaded.models()[0].text && loaded.models()[0].weights);

    let dir = tempfile::tempdir().unwrap();
    let (_, contents) = lived(dir.path(), false);
    let segment = fs::read_dir(dir.path().join("audit")).unwrap().next().unwrap().unwrap().path();
    let mut frames = fs::read(&segment).unwrap();
    *frames.last_mut().unwrap() ^= 1;
    fs::write(&segment, frames).unwrap();
    let error = contents.write(&contents.header(&maker(), &key()), &key(), Vec::new()).unwrap_err();
    assert!(format!("{error:#}").contains("wrong checksum"), "{error:#}");
}

#[test]
fn a_backup_of_the_first_version_is_still_read() {
    // Written by the first build that made backups.
    let golden = izar_golden();
    let loaded = verify(&golden, &key()).unwrap();
    assert_eq!((loaded.header.format, loaded.state.config_snapshot().keys.len()), (1, 1));
}

fn izar_golden() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/backup/v1.izarbak");
    if !path.exists() && std::env::var("IZAR_BLESS").is_ok_and(|v| v == "1") {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, backed_up(dir.path(), true).1).unwrap();
    }
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
