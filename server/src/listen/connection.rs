//! One connection: hyper over a socket that notices readers who stand still, and an end when it is time.

use std::{
    convert::Infallible,
    io,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{Request, header},
    response::{IntoResponse, Response},
};
use hyper::{
    body::{Bytes, Frame, Incoming, SizeHint},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, OwnedSemaphorePermit},
    time::{Instant, Sleep, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::{ListenConfig, framing::Head};
use crate::{
    error::{ApiError, ErrorKind},
    http::edge::OddFraming,
    state::View,
};

/// Bytes of a request's head at most.
const MAX_HEAD: usize = 64 << 10;
/// Lines of a request's head at most.
const MAX_HEADERS: usize = 100;
/// How often a connection is looked at while the server goes down.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Time that a connection without a request gets to bring its first one while the server goes down.
const FIRST_REQUEST: Duration = Duration::from_secs(1);

/// Shared by all connections of a server.
pub(super) struct Shared {
    /// Answers until there is an app.
    waiting: Router,
    /// The app of each view, in the order of [`View::ALL`].
    apps: OnceLock<[Router; View::ALL.len()]>,
    pub(super) config: ListenConfig,
    /// Cancelled: finish what runs, then close.
    pub(super) drain: CancellationToken,
    /// Cancelled: connections that wait are taken, then no more.
    pub(super) closing: CancellationToken,
    /// Cancelled: close.
    pub(super) stop: CancellationToken,
    /// Connections that are open.
    pub(super) open: AtomicUsize,
    /// Told when a connection closes.
    changed: Notify,
}

impl Shared {
    pub(super) fn new(waiting: Router, config: ListenConfig) -> Self {
        Self {
            waiting,
            apps: OnceLock::new(),
            config,
            drain: CancellationToken::new(),
            closing: CancellationToken::new(),
            stop: CancellationToken::new(),
            open: AtomicUsize::new(0),
            changed: Notify::new(),
        }
    }

    /// Requests go to what `app` makes for the view of their address from now on, also those of connections that are
    /// already open.
    pub(super) fn serve(&self, app: impl Fn(View) -> Router) {
        // A second app would be a bug of ours; the first one stays.
        let _ = self.apps.set(View::ALL.map(app));
    }

    fn app(&self, view: View) -> &Router {
        let place = View::ALL.iter().position(|known| *known == view);
        self.apps.get().zip(place).and_then(|(apps, place)| apps.get(place)).unwrap_or(&self.waiting)
    }

    /// Done when no connection is open.
    pub(super) async fn idle(&self) {
        loop {
            let changed = self.changed.notified();
            let mut changed = pin!(changed);
            changed.as_mut().enable();
            if self.open.load(Ordering::Acquire) == 0 {
                return;
            }
            changed.await;
        }
    }
}

/// Why a connection was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// There was room.
    Ordinary,
    /// There was none: it hears how we are, or that there are too many.
    Reserve,
}

/// What the parts of a connection know of each other.
struct Watch {
    /// A lock, because hyper owns the socket and the service; both run on the connection's own task.
    head: Mutex<Head>,
    /// Whether a request has come.
    asked: AtomicBool,
    active: AtomicUsize,
    write_waits: AtomicBool,
}

impl Watch {
    fn head(&self) -> std::sync::MutexGuard<'_, Head> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing is on its way in or out.
    fn is_idle(&self) -> bool {
        self.active.load(Ordering::Acquire) == 0
            && !self.write_waits.load(Ordering::Acquire)
            && !self.head().has_part()
    }
}

/// Counts a connection as closed when dropped, whatever ended it.
struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_waiters();
    }
}

/// Serves one connection to its end.
pub(super) async fn run<S>(
    stream: S,
    class: Class,
    view: View,
    permit: OwnedSemaphorePermit,
    shared: Arc<Shared>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let _open = Open(Arc::clone(&shared));
    let _permit = permit;
    let watch = Arc::new(Watch {
        head: Mutex::new(Head::new()),
        asked: AtomicBool::new(false),
        active: AtomicUsize::new(0),
        write_waits: AtomicBool::new(false),
    });
    let late = shared.drain.is_cancelled();
    let header_timeout = match class {
        Class::Ordinary => shared.config.header_timeout,
        Class::Reserve => shared.config.header_timeout.min(Duration::from_secs(2)),
    };
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .keep_alive(class == Class::Ordinary && !late);
    let service = {
        let (shared, watch) = (Arc::clone(&shared), Arc::clone(&watch));
        service_fn(move |request| answer(request, (class, view), Arc::clone(&shared), Arc::clone(&watch)))
    };
    let io = Watched { stream, watch: Arc::clone(&watch), stall: None, limit: shared.config.write_timeout };
    let mut connection = pin!(builder.serve_connection(TokioIo::new(io), service));
    tokio::select! {
        // A client that breaks off, stalls or sends nonsense is no event for the log.
        _ = connection.as_mut() => return,
        () = shared.stop.cancelled() => return,
        () = shared.drain.cancelled() => {}
    }
    // hyper's graceful end closes a connection whose first request is still on its way, and the client could not know
    // whether that request was run. So a connection that has asked nothing yet gets a moment to do so.
    let moment = Instant::now() + header_timeout.min(FIRST_REQUEST);
    let mut told = late;
    loop {
        let asked = watch.asked.load(Ordering::Acquire);
        if asked && !told {
            connection.as_mut().graceful_shutdown();
            told = true;
        }
        tokio::select! {
            _ = connection.as_mut() => return,
            () = shared.stop.cancelled() => return,
            () = sleep(LOOK_EVERY) => {
                let may_ask = !asked && Instant::now() < moment;
                if watch.is_idle() && !may_ask {
                    return;
                }
            }
        }
    }
}

async fn answer(
    request: Request<Incoming>,
    (class, view): (Class, View),
    shared: Arc<Shared>,
    watch: Arc<Watch>,
) -> Result<Response, Infallible> {
    let active = Active::new(Arc::clone(&watch));
    watch.asked.store(true, Ordering::Release);
    let mut request = request.map(Body::new);
    if watch.head().is_odd(request.headers().contains_key(header::TRANSFER_ENCODING)) {
        request.extensions_mut().insert(OddFraming);
    }
    let open_route = matches!(request.uri().path(), "/health" | "/ready" | "/metrics");
    let response = if class == Class::Reserve && !open_route {
        ApiError::new(ErrorKind::Overloaded, "The server has too many open connections.").into_response()
    } else {
        // A router's only error is `Infallible`.
        shared.app(view).clone().oneshot(request).await?
    };
    watch.head().expect();
    Ok(response.map(|body| Body::new(Counted { body, _active: active })))
}

/// A request that is being answered.
struct Active {
    watch: Arc<Watch>,
}

impl Active {
    fn new(watch: Arc<Watch>) -> Self {
        watch.active.fetch_add(1, Ordering::AcqRel);
        Self { watch }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.watch.active.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A body that keeps its request counted until it is sent or dropped.
struct Counted {
    body: Body,
    _active: Active,
}

impl hyper::body::Body for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A socket that shows its bytes to [`Head`] and gives up on a client that does not read.
struct Watched<S> {
    stream: S,
    watch: Arc<Watch>,
    /// Runs while a write waits.
    stall: Option<Pin<Box<Sleep>>>,
    limit: Duration,
}

impl<S> Watched<S> {
    /// Lets `result` pass; an error if writes have waited too long.
    fn noticed<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        self.watch.write_waits.store(result.is_pending(), Ordering::Release);
        if result.is_ready() {
            self.stall = None;
            return result;
        }
        let limit = self.limit;
        let stall = self.stall.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(stall.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.watch.head().arrived(buf.filled().get(before..).unwrap_or_default());
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.noticed(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.noticed(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        // A flush of a socket is always ready and says nothing about the write before it.
        if result.is_pending() { self.noticed(cx, result) } else { result }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
