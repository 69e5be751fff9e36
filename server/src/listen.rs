//! Our own accept loop: sockets to HTTP connections, with limits, and an orderly end.
//!
//! Accepting never stops for long: at the connection cap some more are taken and told 503 (health is still answered),
//! and when descriptors run out the loop rests a moment. Each connection has 10 s for a request's head, and 30 s for a
//! client that does not read. The end, in steps: the first signal makes `/ready` say no and, after the drain delay, the
//! engine refuse; idle connections are closed; running requests finish; at the deadline, or at the second signal, they are cut with
//! an error event.

mod connection;
mod framing;
mod shutdown;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use axum::Router;
use ingle_engine::Health;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::task::TaskTracker;

use crate::{
    http,
    state::{AppState, View},
    tier,
};
use connection::{Class, Shared};
pub use shutdown::{Shutdown, ShutdownTrigger};

/// Connections taken over the cap at most, to be told that there are too many.
const RESERVE: usize = 64;
/// Descriptors left for files, pipes, the hub and the reserve.
const OTHER_FILES: u64 = 256;
/// Bytes the kernel may keep for a client that does not read.
const SEND_BUFFER: u32 = 128 << 10;
/// How often the engine is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(250);

/// Settings of the accept loop.
#[derive(Debug, Clone)]
pub struct ListenConfig {
    /// Open connections at most.
    pub max_connections: usize,
    /// Time for the head of a request, and between requests of a connection.
    pub header_timeout: Duration,
    /// Time a client may read nothing of its answer.
    pub write_timeout: Duration,
    /// Time for running requests after the first signal and the delay.
    pub drain_timeout: Duration,
    /// Time after the first signal in which `/ready` says no and requests are still taken.
    pub drain_delay: Duration,
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            header_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(30),
            drain_delay: Duration::ZERO,
        }
    }
}

/// Why serving ended other than by a signal.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The engine has ended; the process should, too.
    #[error("the engine has ended")]
    EngineDead,
}

/// Raises the number of files this process may open as far as it is allowed, and returns the number of connections
/// that fit with room to spare.
#[must_use]
pub fn raise_file_limit() -> usize {
    connections(rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024))
}

/// Connections that fit into `files` descriptors beside everything else; of few descriptors a quarter.
fn connections(files: u64) -> usize {
    let fit = files.saturating_sub(OTHER_FILES).max(files / 4).max(1);
    usize::try_from(fit).unwrap_or(usize::MAX)
}

/// A bound socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    view: View,
}

#[derive(Debug)]
enum Socket {
    /// An address and port.
    Tcp(TcpListener),
    /// A path in the file system; removed at the end.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Binds `address`. Call it before the model is loaded: a port in use is known at once.
    ///
    /// # Errors
    /// As the system says: in use, not allowed, not ours.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        // Accepted sockets inherit it.
        socket.set_send_buffer_size(SEND_BUFFER)?;
        socket.bind(address)?;
        Ok(Self { socket: Socket::Tcp(socket.listen(1024)?), view: View::All })
    }

    /// Binds `path`. A socket that a dead process left there is replaced; one that answers is in use.
    ///
    /// # Errors
    /// As the system says, and `AddrInUse` for a path that is in use or no socket.
    pub fn unix(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        if let Ok(there) = std::fs::symlink_metadata(path) {
            let in_use =
                !there.file_type().is_socket() || std::os::unix::net::UnixStream::connect(path).is_ok();
            if in_use {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            std::fs::remove_file(path)?;
        }
        Ok(Self { socket: Socket::Unix(UnixListener::bind(path)?, path.to_owned()), view: View::All })
    }

    /// The address of a TCP socket; with port 0 asked for, the port that was given.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix(..) => None,
        }
    }

    /// The same socket, serving only what `view` shows.
    #[must_use]
    pub fn with_view(mut self, view: View) -> Self {
        self.view = view;
        self
    }

    /// What it serves.
    #[must_use]
    pub fn view(&self) -> View {
        self.view
    }

    async fn accept(&self) -> io::Result<Accepted> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Events are small and must not wait for each other; without it they are only late.
                let _ = stream.set_nodelay(true);
                Ok(Accepted::Tcp(stream))
            }
            Socket::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix(_, path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Serves `app` until the end that `shutdown` asks for: [`Server::start`] and [`Server::run`] in one.
///
/// # Errors
/// As [`Server::run`].
pub async fn serve(
    listeners: Vec<Listener>,
    app: Router,
    state: AppState,
    config: ListenConfig,
    shutdown: Shutdown,
) -> Result<(), ServeError> {
    Server::start(listeners, config).run(app, state, shutdown).await
}

/// A server that accepts connections. Until it is given an app it answers `/health` and says 503 to all else.
pub struct Server {
    shared: Arc<Shared>,
    accepting: TaskTracker,
}

impl Server {
    /// Begins to accept.
    #[must_use]
    pub fn start(listeners: Vec<Listener>, config: ListenConfig) -> Self {
        let shared = Arc::new(Shared::new(http::waiting_app(), config));
        let accepting = TaskTracker::new();
        for listener in listeners {
            accepting.spawn(accept_loop(listener, Arc::clone(&shared)));
        }
        accepting.close();
        Self { shared, accepting }
    }

    /// Serves `app` until the end that `shutdown` asks for.
    ///
    /// # Errors
    /// [`ServeError::EngineDead`] if the engine ended by itself: clients have been told, the process should exit with
    /// a failure.
    pub async fn run(self, app: Router, state: AppState, mut shutdown: Shutdown) -> Result<(), ServeError> {
        let Self { shared, accepting } = self;
        // The first look is before the first request, so that the card is never without one.
        state.tick();
        shared.serve(|view| match view {
            View::All => app.clone(),
            other => http::app_of(state.clone(), other),
        });
        let mut died = false;
        let watching = tokio::spawn(watch_engine(state.clone()));
        tokio::select! {
            () = shutdown.signalled(1) => {}
            () = engine_died(&state) => died = true,
        }
        if died {
            tracing::error!("the engine has ended; shutting down");
            state.start_drain();
            // Waiting clients were told by the engine; a moment for the last answers and a last look at /ready.
            shared.drain.cancel();
            let deadline = Instant::now() + Duration::from_secs(2);
            let _ = timeout_at(deadline, shared.idle()).await;
        } else {
            tracing::info!("shutting down: no new requests, running ones finish");
            let delay = shared.config.drain_delay;
            let deadline = Instant::now() + delay + shared.config.drain_timeout;
            state.announce_drain();
            // Routers first: until they have taken us off, and have seen what /ready says, what they send is served.
            tokio::select! {
                _ = async { tokio::join!(state.registry().leave(), sleep(delay)) } => {}
                () = shutdown.signalled(2) => {}
            }
            state.start_drain();
            shared.drain.cancel();
            tokio::select! {
                () = shared.idle() => {}
                () = tokio::time::sleep_until(deadline) => tracing::warn!("requests still run at the drain deadline; cutting them"),
                () = shutdown.signalled(2) => tracing::warn!("second signal; cutting running requests"),
                () = engine_died(&state) => died = true,
            }
        }
        state.cut_requests();
        // Nobody new, before the last look: a connection that is taken while this ends would be cut in its request.
        shared.closing.cancel();
        let _ = timeout_at(Instant::now() + Duration::from_millis(200), accepting.wait()).await;
        // What was cut is written to clients that read.
        let _ = timeout_at(Instant::now() + Duration::from_millis(500), shared.idle()).await;
        shared.stop.cancel();
        let _ = timeout_at(Instant::now() + Duration::from_millis(200), accepting.wait()).await;
        watching.abort();
        if died { Err(ServeError::EngineDead) } else { Ok(()) }
    }
}

/// Notes the engine's progress for the tier card.
async fn watch_engine(state: AppState) {
    loop {
        state.tick();
        sleep(tier::TICK).await;
    }
}

async fn engine_died(state: &AppState) {
    while state.health() != Health::Dead {
        sleep(WATCH_EVERY).await;
    }
}

async fn accept_loop(listener: Listener, shared: Arc<Shared>) {
    let places = Places::new(shared.config.max_connections);
    let view = listener.view;
    let mut last_complaint: Option<Instant> = None;
    loop {
        // A place first: who is not accepted yet waits in the system's queue.
        let place = tokio::select! {
            biased;
            () = shared.stop.cancelled() => return,
            place = places.any() => place,
            () = shared.closing.cancelled() => return,
        };
        // In this order: who waits already is answered, not reset.
        let accepted = tokio::select! {
            biased;
            () = shared.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
            () = shared.closing.cancelled() => return,
        };
        match accepted {
            Ok(stream) => {
                let (permit, class) = places.better(place);
                let shared = Arc::clone(&shared);
                shared.open.fetch_add(1, Ordering::AcqRel);
                match stream {
                    Accepted::Tcp(stream) => {
                        tokio::spawn(connection::run(stream, class, view, permit, shared))
                    }
                    Accepted::Unix(stream) => {
                        tokio::spawn(connection::run(stream, class, view, permit, shared))
                    }
                };
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                if last_complaint.is_none_or(|at| at.elapsed() > Duration::from_secs(5)) {
                    tracing::error!(%error, "cannot accept connections for now");
                    last_complaint = Some(Instant::now());
                }
                // Out of descriptors or memory: asking again at once would only burn time.
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Places for connections: the ordinary ones, and the reserve.
struct Places {
    ordinary: Arc<Semaphore>,
    reserve: Arc<Semaphore>,
}

type Place = (OwnedSemaphorePermit, Class);

impl Places {
    fn new(ordinary: usize) -> Self {
        let ordinary = ordinary.clamp(1, Semaphore::MAX_PERMITS);
        let reserve = Arc::new(Semaphore::new(RESERVE.min(ordinary)));
        Self { ordinary: Arc::new(Semaphore::new(ordinary)), reserve }
    }

    /// An ordinary place if there is one, else one of the reserve; waits if there is none of either.
    async fn any(&self) -> Place {
        const OPEN: &str = "the semaphore is never closed";
        tokio::select! {
            biased;
            permit = Arc::clone(&self.ordinary).acquire_owned() => (permit.expect(OPEN), Class::Ordinary),
            permit = Arc::clone(&self.reserve).acquire_owned() => (permit.expect(OPEN), Class::Reserve),
        }
    }

    /// `place`, or an ordinary one for it: one may have become free while nobody came.
    fn better(&self, place: Place) -> Place {
        match (place.1, Arc::clone(&self.ordinary).try_acquire_owned()) {
            (Class::Reserve, Ok(permit)) => (permit, Class::Ordinary),
            _ => place,
        }
    }
}

/// Whether `error` is of the connection that came and not of the socket that accepts.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::ConnectionAborted | K::ConnectionRefused | K::ConnectionReset | K::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_the_rest() {
        for (files, fit) in
            [(u64::MAX, usize::MAX - 256), (65_536, 65_280), (1024, 768), (256, 64), (64, 16), (1, 1)]
        {
            assert_eq!(connections(files), fit, "{files}");
        }
        for files in 8..2000 {
            let ordinary = connections(files);
            assert!(ordinary + RESERVE.min(ordinary) < files as usize, "{files}: {ordinary}");
        }
    }
}
