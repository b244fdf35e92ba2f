//! Certificates made and read back, and handshakes between the two ends in memory.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

/// A CA of a cluster in a temporary folder, also for the tests of `quic` and `blob`.
pub(crate) struct Pki(tempfile::TempDir);

impl Pki {
    pub(crate) fn new(cluster: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), &cluster.parse().unwrap()).unwrap();
        Self(dir)
    }
    fn files(&self, name: &str) -> Files {
        let at = |file: String| self.0.path().join(file);
        Files { ca: at("ca.pem".into()), cert: at(format!("{name}.pem")), key: at(format!("{name}.key")) }
    }
    fn issue(&self, uri: &str) -> Files {
        let identity: Identity = uri.parse().unwrap();
        pki::issue(self.0.path(), &identity, &["localhost".into(), "127.0.0.1".into()], self.0.path()).unwrap();
        self.files(identity.node.as_str())
    }
    pub(crate) fn node(&self, uri: &str) -> NodeTls {
        NodeTls::load(&self.issue(uri)).unwrap()
    }
    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }
    /// A new certificate for an API's listener, in the place of an older one.
    pub(crate) fn api(&self) -> ApiTls {
        pki::issue_server(self.0.path(), "api", &["localhost".into()], self.0.path()).unwrap();
        ApiTls::load(&self.path("api.pem"), &self.path("api.key")).unwrap()
    }
}

/// Shakes hands in memory; returns the first refusal.
fn shake(client: ClientConfig, server: impl Into<Arc<ServerConfig>>) -> Result<(), rustls::Error> {
    let mut client = rustls::ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap())?;
    let mut server = rustls::ServerConnection::new(server.into())?;
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut rest = &wire[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut rest = &wire[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets()?;
        }
    }
    Ok(())
}

#[test]
fn nodes_of_one_cluster_accept_each_other() {
    let pki = Pki::new("dev");
    let controller = pki.node("izar://dev/local/controller/c1");
    let agent = pki.node("izar://dev/local/agent/a1");
    assert_eq!(controller.identity().to_string(), "izar://dev/local/controller/c1");
    let c1 = "c1".parse().unwrap();
    let client = agent.quic_client_to(Some(Role::Controller), Some(&c1)).unwrap();
    shake(client, controller.quic_server().unwrap()).unwrap();
}

#[test]
fn the_dialling_side_refuses_another_role_or_node_by_name() {
    let pki = Pki::new("dev");
    let controller = pki.node("izar://dev/local/controller/c1");
    let agent = pki.node("izar://dev/local/agent/a1");
    let c2 = "c2".parse().unwrap();
    let dial = |role, node| {
        shake(agent.quic_client_to(role, node).unwrap(), controller.quic_server().unwrap()).unwrap_err().to_string()
    };
    assert!(dial(Some(Role::Agent), None).contains("the peer is controller c1, expected role agent"));
    assert!(dial(None, Some(&c2)).contains("the peer is node c1, expected c2"));
}

#[test]
fn certificates_of_another_ca_are_refused_by_both_sides() {
    let (ours, theirs) = (Pki::new("dev"), Pki::new("dev"));
    let controller = ours.node("izar://dev/local/controller/c1");
    let stranger = theirs.node("izar://dev/local/agent/a1");
    // Both CAs have the same name, so that it is the signature that tells them apart.
    let error = shake(stranger.quic_client().unwrap(), controller.quic_server().unwrap()).unwrap_err();
    assert!(matches!(error, rustls::Error::InvalidCertificate(_)), "{error}");
    // A stranger that trusts our CA, but whose certificate is of its own.
    let mixed = Files { ca: ours.files("ca").ca, ..theirs.files("a1") };
    assert!(format!("{:#}", NodeTls::load(&mixed).unwrap_err()).contains("is not one of the CA"));
    assert!(format!("{:#}", without_key(&mixed).unwrap_err()).contains("is not one of the CA"));
    let mut client = controller.quic_client().unwrap();
    client.client_auth_cert_resolver = stranger.quic_client().unwrap().client_auth_cert_resolver;
    let error = shake(client, controller.quic_server().unwrap()).unwrap_err();
    assert!(matches!(error, rustls::Error::InvalidCertificate(_)), "{error}");
}

#[test]
fn a_certificate_without_identity_is_no_node() {
    let pki = Pki::new("dev");
    let controller = pki.node("izar://dev/local/controller/c1");
    pki::issue_server(pki.0.path(), "api", &["localhost".into()], pki.0.path()).unwrap();
    let api = pki.files("api");
    assert!(format!("{:#}", NodeTls::load(&api).unwrap_err()).contains("has 0 URIs, one is needed"));
    let server = https_server(&api.cert, &api.key).unwrap();
    let mut client = controller.quic_client().unwrap();
    client.alpn_protocols.clear();
    let error = shake(client, server).unwrap_err();
    assert!(error.to_string().contains("has 0 URIs, one is needed"), "{error}");
}

#[test]
fn a_client_without_certificate_is_refused() {
    let pki = Pki::new("dev");
    let controller = pki.node("izar://dev/local/controller/c1");
    let mut client = (*https_client(&pki.files("ca").ca).unwrap()).clone();
    client.alpn_protocols = vec![ALPN.to_vec()];
    assert!(matches!(shake(client, controller.quic_server().unwrap()), Err(rustls::Error::NoCertificatesPresented)));
}

#[test]
fn the_api_speaks_tls_1_3_and_nothing_older() {
    let pki = Pki::new("dev");
    pki::issue_server(pki.0.path(), "api", &["localhost".into(), "127.0.0.1".into()], pki.0.path()).unwrap();
    let api = pki.files("api");
    let server = https_server(&api.cert, &api.key).unwrap();
    shake((*https_client(&api.ca).unwrap()).clone(), server.clone()).unwrap();

    // A ClientHello of TLS 1.2: no extension offers a newer version.
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0]);
    // supported groups: x25519, secp256r1; signature algorithms: ecdsa_secp256r1_sha256
    let extensions = [0u8, 10, 0, 6, 0, 4, 0, 29, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3];
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut hello = vec![22, 3, 1];
    hello.extend((body.len() as u16 + 4).to_be_bytes());
    hello.extend([1, 0]);
    hello.extend((body.len() as u16).to_be_bytes());
    hello.extend(body);
    let mut connection = rustls::ServerConnection::new(server).unwrap();
    connection.read_tls(&mut &hello[..]).unwrap();
    assert!(matches!(connection.process_new_packets(), Err(rustls::Error::PeerIncompatible(_))));
}

#[test]
fn a_renewed_certificate_is_used_and_a_wrong_one_is_not() {
    let pki = Pki::new("dev");
    let files = pki.issue("izar://dev/local/controller/c1");
    let tls = NodeTls::load(&files).unwrap();
    let first = tls.own.get().key.cert[0].clone();
    pki.issue("izar://dev/local/controller/c1");
    tls.own.look_now();
    let second = tls.own.get().key.cert[0].clone();
    assert_ne!(first, second);
    // Another node's certificate in the same place.
    let other = pki.issue("izar://dev/local/controller/c2");
    std::fs::copy(&other.cert, &files.cert).unwrap();
    std::fs::copy(&other.key, &files.key).unwrap();
    tls.own.look_now();
    assert_eq!(tls.own.get().key.cert[0], second);
    std::fs::write(&files.cert, "rubbish").unwrap();
    tls.own.look_now();
    assert_eq!(tls.own.get().key.cert[0], second);
}

#[test]
fn a_ca_is_never_overwritten_and_serves_its_own_cluster() {
    let pki = Pki::new("dev");
    let error = pki::init(pki.0.path(), &"dev".parse().unwrap()).unwrap_err();
    assert!(error.to_string().contains("a CA is never overwritten"), "{error}");
    let foreign: Identity = "izar://prod/local/agent/a1".parse().unwrap();
    let error = pki::issue(pki.0.path(), &foreign, &[], pki.0.path()).unwrap_err();
    assert!(error.to_string().contains("is that of cluster dev, not of prod"), "{error}");
    let error = pki::issue_server(pki.0.path(), "api", &["a b".into()], pki.0.path()).unwrap_err();
    assert!(error.to_string().contains("`a b` is neither a host name nor an address"), "{error}");
}

#[test]
fn keys_that_others_may_read_are_neither_made_nor_taken() {
    let pki = Pki::new("dev");
    let files = pki.issue("izar://dev/local/agent/a1");
    for key in [&files.key, &pki.0.path().join("ca.key")] {
        assert_eq!(std::fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
    }
    std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(format!("{:#}", NodeTls::load(&files).unwrap_err()).contains("may be read by others"));
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let pki = Pki::new("dev");
    let (a1, a2) = (pki.issue("izar://dev/local/agent/a1"), pki.issue("izar://dev/local/agent/a2"));
    let mixed = Files { key: a2.key, ..a1 };
    let error = format!("{:#}", NodeTls::load(&mixed).unwrap_err());
    assert!(error.contains("a1.pem") && error.contains("a2.key"), "{error}");
}

#[test]
fn a_certificate_that_has_expired_is_called_so_with_and_without_its_key() {
    let pki = Pki::new("dev");
    let files = pki.issue("izar://dev/local/agent/a1");
    assert_eq!(without_key(&files).unwrap().to_string(), "izar://dev/local/agent/a1");
    let identity = "izar://dev/local/agent/a1".parse().unwrap();
    pki::issue_until(pki.0.path(), &identity, &[], pki.0.path(), 0).unwrap();
    let today = dates::day((crate::clock::wall_ms() / 1000) as i64);
    let said = [NodeTls::load(&files).map(drop).unwrap_err(), without_key(&files).map(drop).unwrap_err()];
    for error in said {
        let expected = format!("a1.pem has expired (on {today})");
        assert!(format!("{error:#}").ends_with(&expected), "{error:#}");
    }
}
