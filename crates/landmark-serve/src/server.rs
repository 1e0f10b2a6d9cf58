//! The server from its start to its end.

use crate::engine::{self, Command, Served};
use crate::http::{App, now, router};
use crate::metrics::Metrics;
use crate::{Error, Limits, Settings};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use landmark_inference::Template;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

/// Threads that speak HTTP. The model has one of its own, and those that compute with it.
const HTTP_THREADS: usize = 2;
/// Bodies that are looked into at once.
const PARSERS: usize = 2;
/// How long a client may take for the head of a request, and be silent between requests.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// Bytes of a head, at most.
const HEAD_BYTES: usize = 64 << 10;
/// Lines of a head, at most.
const HEAD_LINES: usize = 100;
/// Before a connection is taken again after one could not be: files may be free then.
const BREATH: Duration = Duration::from_millis(100);
/// What connections have left when no request is worked on any more.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serves until Ctrl-C or SIGTERM: then nobody is let in any more, and requests have `limits.grace` to come to their end; a second signal
/// ends them at once. `ready` is told the address when the first request can come.
///
/// # Errors
/// A model that cannot be served, an address that cannot be listened on, a folder that cannot be used.
pub fn serve(settings: Settings, ready: impl FnOnce(SocketAddr)) -> Result<(), Error> {
    make_folder(&settings)?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(HTTP_THREADS).enable_all().build().map_err(Error::Start)?;
    runtime.block_on(run(settings, ready))
}

/// A server's routes, for a program that listens itself. They need tokio's time. The thread that has the model ends when they are dropped.
///
/// # Errors
/// A model that cannot be served, a folder that cannot be used.
pub fn routes(settings: Settings) -> Result<Router, Error> {
    make_folder(&settings)?;
    let is_local = settings.host.is_loopback();
    Ok(open(settings, is_local)?.0)
}

fn make_folder(Settings { sessions, .. }: &Settings) -> Result<(), Error> {
    std::fs::create_dir_all(sessions).map_err(|reason| Error::Sessions { path: sessions.clone(), reason })
}

/// The thread that has the model.
struct Thread {
    commands: Sender<Command>,
    /// Ends when the thread does.
    ended: oneshot::Receiver<()>,
    handle: JoinHandle<()>,
}

/// Opens the model in a thread of its own. `is_loopback`: nothing but this machine is listened to.
fn open(settings: Settings, is_loopback: bool) -> Result<(Router, Thread), Error> {
    let metrics = Arc::new(Metrics::default());
    let Served { pretrained, commands, ended, thread: handle } = engine::start(&settings, metrics.clone())?;
    let Settings { name, chat_template, keys, limits, converter, .. } = settings;
    let template = match chat_template.or_else(|| pretrained.chat_template.clone()) {
        Some(source) => {
            let (begin, end) = (pretrained.bos_token.clone(), pretrained.eos_token.clone());
            Some(Template::new(source, begin, end).map_err(Error::Model)?)
        }
        None => None,
    };
    let app = App {
        is_local: keys.is_none() && is_loopback,
        parsers: Semaphore::new(PARSERS),
        commands: commands.clone(),
        pretrained,
        template,
        name,
        since: now(),
        keys,
        limits,
        slots: Arc::new(Semaphore::new(limits.parallel + limits.queue)),
        metrics,
        converter,
    };
    Ok((router(app), Thread { commands, ended, handle }))
}

async fn run(settings: Settings, ready: impl FnOnce(SocketAddr)) -> Result<(), Error> {
    let asked = SocketAddr::new(settings.host, settings.port);
    let refuse = |reason| Error::Listen { address: asked, reason };
    let listener = TcpListener::bind(asked).await.map_err(refuse)?;
    let address = listener.local_addr().map_err(refuse)?;
    let Limits { grace, connections, .. } = settings.limits;
    let (router, Thread { commands, mut ended, handle }) = open(settings, address.ip().is_loopback())?;
    let mut signals = Signals::watch().map_err(Error::Start)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let mut server = tokio::spawn(listen(listener, router, connections, stopped));
    ready(address);

    let outcome = tokio::select! {
        _ = &mut ended => Err(Error::ModelThread),
        () = signals.next() => Ok(()),
    };
    drop(stop);
    if outcome.is_ok() {
        tokio::select! {
            _ = tokio::time::timeout(grace, &mut server) => {}
            () = signals.next() => {}
        }
    }
    // Whether the thread is still there to be told is what the next line waits for.
    let _ = commands.send(Command::End);
    let joined = tokio::task::spawn_blocking(move || handle.join()).await;
    if !server.is_finished() {
        let _ = tokio::time::timeout(LAST_WORDS, &mut server).await;
    }
    match joined {
        Ok(Ok(())) => outcome,
        _ => Err(Error::ModelThread),
    }
}

/// Speaks HTTP with those who connect, so many at once, until `stopped` is told or dropped; then with those who are there, to the end of their requests.
async fn listen(listener: TcpListener, router: Router, connections: usize, mut stopped: oneshot::Receiver<()>) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(HEAD_BYTES).max_headers(HEAD_LINES);
    let (places, all) = (Arc::new(Semaphore::new(connections)), GracefulShutdown::new());
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            _ = &mut stopped => break,
        };
        let (Ok(place), Ok((stream, _))) = (place, accepted) else {
            tokio::time::sleep(BREATH).await;
            continue;
        };
        // A token is a packet: it does not wait for the next one. Where this cannot be told, it is slower.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = all.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            let _place = place;
            // What goes wrong with a connection is its client's business.
            let _ = connection.await;
        });
    }
    drop(listener);
    all.shutdown().await;
}

/// Ctrl-C, and where there is one SIGTERM.
#[cfg(unix)]
struct Signals(tokio::signal::unix::Signal, tokio::signal::unix::Signal);

#[cfg(unix)]
impl Signals {
    fn watch() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self(signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?))
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// Ctrl-C.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn watch() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
