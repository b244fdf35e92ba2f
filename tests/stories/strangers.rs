//! Those who do not belong: old TLS, certificates of another authority, frames too large. Refused, counted,
//! logged once. (What a role may not do is tested beside `common/quic`, where the forbidden can be said.)

use std::net::SocketAddr;
use std::path::Path;

use izar_common::id::Role;
use izar_common::quic::{Endpoint, Profile};
use izar_common::tls::{Files, NodeTls};
use izar_common::wire::agent::{Down, Up};
use izar_common::wire::handshake::Open;
use izar_common::wire::{Wire, to_bytes};
use izar_tests::nodes::{self, Site};
use izar_tests::waiting::{SOON, until};
use izar_tests::{logs, python};

/// Takes an address, a CA and a protocol version; prints what was negotiated, or fails.
const HANDSHAKE: &str = r#"
import socket, ssl, sys
host, port, ca, version = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
with socket.create_connection((host, int(port)), timeout=10) as tcp:
    with context.wrap_socket(tcp, server_hostname=host) as tls:
        print(tls.version())
"#;

#[test]
fn tls_1_2_is_refused_and_1_3_works() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    site.start_controllers();
    let address = site.client(1, None).address();
    let ca = site.pki().join("ca.pem");
    let handshake = |version: &str| {
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        python::run(Path::new("python3"), HANDSHAKE, &[&host, &port, ca.to_str().unwrap(), version])
    };
    let old = handshake("TLSv1_2");
    assert!(!old.success && old.stderr.contains("ssl.SSLError"), "{}{}", old.stdout, old.stderr);
    let new = handshake("TLSv1_3");
    assert_eq!(new.stdout.trim(), "TLSv1.3", "{}", new.stderr);
    site.finish(&[]);
}

/// How often a controller refused a peer since it began.
fn refused(site: &Site) -> u64 {
    site.admin(1).status().unwrap()["refused"]["peers"].as_u64().expect("refused.peers is a number")
}

fn wait_refused(site: &Site, at_least: u64) {
    until("refusals to be counted", SOON, || {
        let count = refused(site);
        anyhow::ensure!(count >= at_least, "{count} of {at_least}");
        Ok(())
    });
}

/// Warnings of the controller that speak of a refusal.
fn refusal_warnings(site: &Site) -> Vec<String> {
    let mut lines = logs::read(&site.logs());
    lines.retain(|line| line.file == "c1.log" && line.level == "WARN" && line.text.contains("refused"));
    lines.iter().map(ToString::to_string).collect()
}

#[test]
fn an_agent_with_a_certificate_of_another_authority_is_refused_counted_and_logged_once() {
    let _machine = izar_tests::shared();
    let mut site = Site::new(1, false);
    site.start_controllers();
    // An agent that trusts two authorities, its own and the cluster's; the controller knows only the latter.
    let other = site.path("other-pki");
    nodes::make_ca(&other, nodes::CLUSTER);
    nodes::issue(&other, "agent", "a1", &other);
    let both = [other.join("ca.pem"), site.pki().join("ca.pem")].map(|ca| std::fs::read(ca).unwrap()).concat();
    std::fs::write(other.join("ca.pem"), both).unwrap();
    site.write_agent_config("a1", &other);
    site.start("izar-agent", "a1");
    wait_refused(&site, 3);
    assert_eq!(refusal_warnings(&site).len(), 1, "it tries again and again, and is logged once");
    let agents = site.admin(1).json(&["agents", "list"]).unwrap();
    assert_eq!(agents["agents"], serde_json::json!([]), "{agents}");
    site.finish(&["refused a peer"]);
}

/// Loads a node's certificate of the site.
fn node_tls(site: &Site, node: &str) -> NodeTls {
    let file = |name: String| site.pki().join(name);
    let files =
        Files { ca: file("ca.pem".into()), cert: file(format!("{node}.pem")), key: file(format!("{node}.key")) };
    NodeTls::load(&files).expect("a certificate that we issued")
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.unwrap_or_else(|_| panic!("waited {SOON:?} for {what}"))
}

#[test]
fn a_frame_larger_than_its_type_may_be_ends_the_peer_and_not_the_controller() {
    let _machine = izar_tests::shared();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime starts").block_on(announce_too_much());
}

async fn announce_too_much() {
    let mut site = Site::new(1, false);
    site.start_controllers();
    nodes::issue(&site.pki(), "agent", "a1", &site.pki());
    let local: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let endpoint = Endpoint::bind(local, &node_tls(&site, "a1")).unwrap();
    let dial = || endpoint.connect(site.quic(1), Role::Controller, None, Profile::Requests);

    let agent = within("a connection", dial()).await.expect("an agent may connect");
    let (mut up, mut down) = agent.open_bi(Open::Session).await.expect("a stream can be opened");
    up.get_mut().write_all(&oversized_header()).await.expect("a header can be sent");
    let ended = within("the end of a peer that announces too much", async {
        tokio::select! {
            () = agent.closed() => {}
            // Assignments may come first; then the stream must end.
            ended = async { while let Ok(Some(_)) = down.next::<Down>().await {} } => ended
        }
    });
    ended.await;
    within("the endpoint's end", endpoint.close()).await;
    assert!(site.admin(1).status().unwrap()["leader"].is_string(), "the controller is none the worse");
    site.finish(&["refused a peer"]);
}

/// The header of a report that says that it is one byte larger than reports may be.
fn oversized_header() -> Vec<u8> {
    let report = izar_common::health::Report {
        generation: izar_common::health::Generation::default(),
        pid: 1,
        version: String::new(),
        cores: 1,
        memory_bytes: 1,
        gpus: 0,
        labels: Default::default(),
        workers: Vec::new(),
        health: Default::default(),
    };
    let mut header = to_bytes(&Up::Report(Box::new(report)))[..16].to_vec();
    let bytes = u32::try_from(Up::LIMIT + 1).expect("limits fit");
    header[8..12].copy_from_slice(&bytes.to_be_bytes());
    header
}
