//! The controller process: builds its parts, starts them in the order of their needs, stops them in reverse.
//!
//! Decides nothing. Whatever can be refused (a wrong key file, another cluster's data, a port in use) is refused
//! before anything answers.

use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::Context;
use izar_common::clock::Clock;
use izar_common::id::Role;
use izar_common::seal::{MasterKey, Pepper};
use izar_common::wire::handshake::Open;
use izar_common::{blob, disk, quic, service, tls};
use serde::Serialize;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agents::Agents;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::control::{self, Control};
use crate::gateway::Gateway;
use crate::gateway::provisional::Provisional;
use crate::raft::{self, HAND_OVER, Raft};
use crate::rejoin::{self, Giver};
use crate::state::command::Command;

mod measured;
mod told;

/// How long running requests may take to finish at a stop.
const DRAIN: Duration = Duration::from_secs(10);

/// Clients that wait to be taken up; as many as tokio has by itself.
const BACKLOG: u32 = 1024;

/// Where this controller listens; written to `endpoints.json` in the data directory once it does.
#[derive(Debug, Clone, Serialize)]
pub struct Endpoints {
    pub quic: SocketAddr,
    pub api: SocketAddr,
    pub plaintext: Option<SocketAddr>,
    pub admin_socket: std::path::PathBuf,
}

/// Pause after a draining controller could not hand its leadership over.
const HAND_OVER_AGAIN: Duration = Duration::from_secs(1);

/// A running controller.
pub struct Daemon {
    shutdown: CancellationToken,
    /// What serves requests: ends first, so that turns can still be closed.
    serving: TaskTracker,
    /// What connects nodes: ends after it.
    links: TaskTracker,
    links_end: CancellationToken,
    raft: Raft,
    gateway: Gateway,
    agents: Agents,
    endpoint: Arc<quic::Endpoint>,
    driver: Arc<raft::Driver>,
    certificates: Arc<tls::Certificates>,
}

impl Daemon {
    /// Builds and starts everything; returns when all listeners are bound. `admin` is the operators' socket if somebody
    /// else has bound it.
    pub async fn start(config: Config, admin: Option<UnixListener>) -> anyhow::Result<Self> {
        service::watch();
        let node_tls = node_tls(&config)?;
        let pepper = Arc::new(Pepper::load(&config.secrets.pepper)?);
        let master_key = Arc::new(MasterKey::load(&config.secrets.master_key)?);
        let api_tls = tls::ApiTls::load(&config.api.cert, &config.api.key)?;
        let options = config.raft_options();

        let endpoint = Arc::new(quic::Endpoint::bind(config.quic.listen, &node_tls)?);
        // Before this member promises anything: one that could not serve then ends first, and knows of nothing.
        let https = bind(config.api.listen, "api.listen")?;
        let plain = config.api.plaintext_listen.map(|address| bind(address, "api.plaintext_listen")).transpose()?;
        let clock = Arc::new(Clock::default());
        rejoin::remember(&options, &endpoint, &master_key).await?;
        let (raft, driver) = Raft::start(options, endpoint.clone(), clock)?;
        let driver = Arc::new(driver);
        let store = blob::Store::open(config.data_dir.join("blobs"))?;
        let agents = Agents::start(raft.clone(), store.clone(), config.site.clone());
        let shutdown = CancellationToken::new();
        let (links, links_end) = (TaskTracker::new(), CancellationToken::new());
        let others = config.others();
        let catalog = Catalog::start(raft.config(), store.clone(), endpoint.clone(), others, &links, links_end.clone());
        match TcpListener::bind(endpoint.local_addr()).await {
            Ok(listener) => agents.serve_tripwires(listener),
            // Agents' deaths are told by their silence then.
            Err(error) => log::info!(address:% = endpoint.local_addr(), error:%; "no tripwires for agents"),
        }

        let provisional = Provisional::open(&config.data_dir)?;
        links.spawn(provisional.clone().run(raft.clone(), links_end.clone()));
        let (pepper_too, limits) = (pepper.clone(), config.limits.clone());
        let gateway = Gateway::new(raft.clone(), agents.clone(), catalog.clone(), pepper_too, provisional, limits);
        let giver = Giver {
            raft: raft.clone(),
            store: store.clone(),
            key: master_key.clone(),
            cluster: config.cluster.clone(),
            one: Arc::new(Semaphore::new(1)),
        };
        let peers = Peers { driver: driver.clone(), store: store.clone(), gateway: gateway.clone(), giver };
        links.spawn(accept(endpoint.clone(), agents.clone(), peers, links_end.clone()));
        let https = listen(https, config.api.listen, "api.listen")?;
        let plain = plain.zip(config.api.plaintext_listen);
        let plain = plain.map(|(socket, address)| listen(socket, address, "api.plaintext_listen")).transpose()?;
        let endpoints = Endpoints {
            quic: endpoint.local_addr(),
            api: https.local_addr()?,
            plaintext: plain.as_ref().map(|p| p.local_addr()).transpose()?,
            admin_socket: config.admin.socket.clone(),
        };
        let control = Control::new(control::Parts {
            raft: raft.clone(),
            agents: agents.clone(),
            gateway: gateway.clone(),
            store,
            pepper,
            master_key,
            cluster: config.cluster.clone(),
            peers: endpoint.clone(),
            api: control::view::Api {
                endpoint: format!("https://{}", endpoints.api),
                plaintext_endpoint: endpoints.plaintext.map(|address| format!("http://{address}")),
            },
            members: members(&config),
            others: config.others(),
        });
        let serving = TaskTracker::new();
        let admin = match admin {
            Some(inherited) => control::inherit(inherited)?,
            None => control::bind(&config.admin.socket, config.admin.group.as_deref())?,
        };
        serving.spawn(control.serve(admin, shutdown.clone()));
        serving.spawn(gateway.clone().serve(Some((https, api_tls.server()?)), plain, shutdown.clone()));
        links.spawn(close_orphans(raft.clone(), links_end.clone()));
        links.spawn(leave_leading(raft.clone(), gateway.clone(), links_end.clone()));
        let certificates = Arc::new(tls::Certificates::new(node_tls, Some(api_tls)));
        let (dates, disk_of, seen) = (certificates.clone(), config.data_dir.clone(), Arc::new(disk::Seen::default()));
        measured::machine(gateway.metrics(), certificates.clone(), seen.clone());
        measured::agents(gateway.metrics(), &agents);
        let ahead_ms = Arc::new(AtomicU64::new(0));
        measured::clock(gateway.metrics(), raft.state().clone(), ahead_ms.clone());
        let until = |end: &CancellationToken| end.clone().cancelled_owned();
        let (dates_end, disk_end, told_end) = (until(&links_end), until(&links_end), until(&links_end));
        let (asking, others, clocks_end) = (endpoint.clone(), config.others(), until(&links_end));
        links.spawn(async move {
            tokio::select! { () = control::peers::watch_clocks(&asking, &others, &ahead_ms) => {}, () = clocks_end => {} }
        });
        links.spawn(async move {
            tokio::select! { () = dates.watch_dates() => {}, () = dates_end => {} }
        });
        links.spawn(async move {
            tokio::select! { () = disk::watch(&disk_of, &seen) => {}, () = disk_end => {} }
        });
        let leadership = raft.leadership();
        links.spawn(async move {
            tokio::select! { () = told::leadership(leadership) => {}, () = told_end => {} }
        });
        write_endpoints(&config.data_dir, &endpoints)?;
        log::info!(node:% = config.node, api:% = endpoints.api, quic:% = endpoints.quic; "controller serves");
        Ok(Self { shutdown, serving, links, links_end, raft, gateway, agents, endpoint, driver, certificates })
    }

    /// Reads certificates anew; requests and connections go on.
    pub fn reload(&self) {
        service::reload(&self.certificates);
    }

    /// Lets another controller lead and clients move on, running requests finish for a while, then closes links and
    /// storage.
    pub async fn stop(self) {
        log::info!("controller stops");
        self.gateway.drain(true);
        if let Some(leader) = self.raft.hand_over(HAND_OVER).await {
            log::debug!(leader:%; "another controller leads");
        }
        self.shutdown.cancel();
        self.serving.close();
        if tokio::time::timeout(DRAIN, self.serving.wait()).await.is_err() {
            log::warn!(limit_ms = DRAIN.as_millis() as u64; "requests still ran at the end of the drain");
        }
        self.agents.stop().await;
        self.driver.shutdown().await;
        self.links_end.cancel();
        self.endpoint.close().await;
        self.links.close();
        self.links.wait().await;
    }
}

/// Which files that the configuration names a start or a reload could not use, and why. Opens nothing else.
pub fn unusable(config: &Config) -> Vec<String> {
    let looks = [
        ("tls", node_tls(config).map(drop)),
        ("secrets.pepper", Pepper::load(&config.secrets.pepper).map(drop).map_err(Into::into)),
        ("secrets.master_key", MasterKey::load(&config.secrets.master_key).map(drop).map_err(Into::into)),
        ("api", tls::ApiTls::load(&config.api.cert, &config.api.key).map(drop)),
    ];
    looks.into_iter().filter_map(|(key, look)| Some(format!("{key}: {:#}", look.err()?))).collect()
}

fn node_tls(config: &Config) -> anyhow::Result<tls::NodeTls> {
    let tls = tls::NodeTls::load(&config.tls)?;
    check_identity(config, &tls)?;
    Ok(tls)
}

fn check_identity(config: &Config, tls: &tls::NodeTls) -> anyhow::Result<()> {
    let identity = tls.identity();
    let matches = identity.cluster == config.cluster
        && identity.site == config.site
        && identity.node == config.node
        && identity.role == Role::Controller;
    anyhow::ensure!(
        matches,
        "tls.cert: {} is {identity}, but this configuration is of izar://{}/{}/controller/{}",
        config.tls.cert.display(),
        config.cluster,
        config.site,
        config.node
    );
    Ok(())
}

fn members(config: &Config) -> Vec<control::view::Member> {
    let view =
        |m: &crate::config::Member| control::view::Member { node: m.node.clone(), address: m.address.to_string() };
    config.members.iter().map(view).collect()
}

/// Takes an address; nobody is let in yet, so clients go elsewhere.
fn bind(address: SocketAddr, key: &str) -> anyhow::Result<TcpSocket> {
    let bound = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok::<_, std::io::Error>(socket)
    };
    bound().with_context(|| format!("{key}: listen on {address}"))
}

fn listen(socket: TcpSocket, address: SocketAddr, key: &str) -> anyhow::Result<TcpListener> {
    socket.listen(BACKLOG).with_context(|| format!("{key}: listen on {address}"))
}

/// Takes connections of peers and agents until the end.
async fn accept(endpoint: Arc<quic::Endpoint>, agents: Agents, peers: Peers, end: CancellationToken) {
    let connections = TaskTracker::new();
    while let Some(Some(connection)) = end.run_until_cancelled(endpoint.accept()).await {
        match connection.peer().role {
            Role::Agent => {
                let agents = agents.clone();
                connections.spawn(async move { agents.serve(connection).await });
            }
            Role::Controller => {
                connections.spawn(peers.clone().serve(connection, connections.clone()));
            }
        }
    }
    connections.close();
    connections.wait().await;
}

/// What other controllers ask for.
#[derive(Clone)]
struct Peers {
    driver: Arc<raft::Driver>,
    store: blob::Store,
    gateway: Gateway,
    giver: Giver,
}

impl Peers {
    /// Serves another controller's streams: Raft's go to the driver, files come from the store.
    async fn serve(self, connection: quic::Connection, tasks: TaskTracker) {
        let peer = connection.peer().node.clone();
        loop {
            tokio::select! {
                stream = connection.accept_uni() => {
                    let Ok((open, receiver)) = stream else { return };
                    let (driver, peer, connection) = (self.driver.clone(), peer.clone(), connection.clone());
                    tasks.spawn(async move {
                        if let Some(error) = driver.on_stream(peer, open, receiver).await {
                            connection.refuse_frame(&error);
                        }
                    });
                }
                stream = connection.accept_bi() => {
                    let Ok((open, sender, receiver)) = stream else { return };
                    let (peers, peer) = (self.clone(), connection.peer().clone());
                    tasks.spawn(async move {
                        let served = match open {
                            Open::Explain => control::explain::serve(&peers.gateway, sender, receiver).await,
                            Open::Rejoin => peers.giver.serve(&peer, sender, receiver).await,
                            Open::About => control::peers::serve(sender).await,
                            _ => blob::serve(&peers.store, sender, receiver).await,
                        };
                        if let Err(error) = served {
                            log::debug!(error:%; "a peer's request ended early");
                        }
                    });
                }
            }
        }
    }
}

/// Closes, as abandoned, the turns that earlier runs of this controller left open.
async fn close_orphans(raft: Raft, end: CancellationToken) {
    let origin = raft.origin().clone();
    let command = Command::CloseOrphans { node: origin.node, before_incarnation: origin.incarnation };
    let retry = async {
        while let Err(unavailable) = raft.propose(command.clone()).await {
            log::debug!(reason = unavailable.reason; "orphaned turns wait for a leader");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    end.run_until_cancelled(retry).await;
}

/// Keeps a controller that drains from leading.
async fn leave_leading(raft: Raft, gateway: Gateway, end: CancellationToken) {
    let (mut leadership, mut draining) = (raft.leadership(), gateway.draining());
    let leave = async {
        loop {
            if draining.wait_for(|draining| *draining).await.is_err() {
                return;
            }
            tokio::select! {
                led = leadership.wait_for(|lead| lead.here) => if led.is_err() { return },
                // Asked anew.
                _ = draining.changed() => continue,
            }
            if raft.hand_over(HAND_OVER).await.is_none() {
                tokio::time::sleep(HAND_OVER_AGAIN).await;
            }
        }
    };
    end.run_until_cancelled(leave).await;
}

fn write_endpoints(data_dir: &Path, endpoints: &Endpoints) -> anyhow::Result<()> {
    let path = data_dir.join("endpoints.json");
    let partial = data_dir.join("endpoints.json.new");
    std::fs::write(&partial, serde_json::to_vec_pretty(endpoints)?)
        .and_then(|()| std::fs::rename(&partial, &path))
        .with_context(|| format!("write {}", path.display()))
}
