//! The server from its start to its end.

use crate::engine::{self, Command, Served};
use crate::http::{App, now, router};
use crate::metrics::Metrics;
use crate::{Error, Settings};
use landmark_inference::Template;
use std::future::IntoFuture;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

/// Threads that speak HTTP. The model has one of its own, and those that compute with it.
const HTTP_THREADS: usize = 2;
/// Bodies that are looked into at once.
const PARSERS: usize = 2;
/// What connections have left when no request is worked on any more.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serves until Ctrl-C or SIGTERM: then nobody is let in any more, and requests have `limits.grace` to come to their end; a second signal
/// ends them at once. `ready` is told the address when the first request can come.
///
/// # Errors
/// A model that cannot be served, an address that cannot be listened on, a folder that cannot be used.
pub fn serve(settings: Settings, ready: impl FnOnce(SocketAddr)) -> Result<(), Error> {
    let sessions = &settings.sessions;
    std::fs::create_dir_all(sessions).map_err(|reason| Error::Sessions { path: sessions.clone(), reason })?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(HTTP_THREADS).enable_all().build().map_err(Error::Start)?;
    runtime.block_on(run(settings, ready))
}

async fn run(settings: Settings, ready: impl FnOnce(SocketAddr)) -> Result<(), Error> {
    let asked = SocketAddr::new(settings.host, settings.port);
    let refuse = |reason| Error::Listen { address: asked, reason };
    let listener = TcpListener::bind(asked).await.map_err(refuse)?;
    let address = listener.local_addr().map_err(refuse)?;
    let metrics = Arc::new(Metrics::default());
    let Served { pretrained, commands, mut ended, thread } = engine::start(&settings, metrics.clone())?;
    let Settings { name, chat_template, keys, limits, converter, .. } = settings;
    let template = match chat_template.or_else(|| pretrained.chat_template.clone()) {
        Some(source) => {
            let (begin, end) = (pretrained.bos_token.clone(), pretrained.eos_token.clone());
            Some(Template::new(source, begin, end).map_err(Error::Model)?)
        }
        None => None,
    };
    let since = now();
    let slots = Arc::new(Semaphore::new(limits.parallel + limits.queue));
    let is_local = keys.is_none() && address.ip().is_loopback();
    let parsers = Semaphore::new(PARSERS);
    let app = App {
        is_local,
        parsers,
        commands: commands.clone(),
        pretrained,
        template,
        name,
        since,
        keys,
        limits,
        slots,
        metrics,
        converter,
    };
    let mut signals = Signals::watch().map_err(Error::Start)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, router(app)).with_graceful_shutdown(async move {
        // A dropped sender stops it too.
        let _ = stopped.await;
    });
    let mut server = tokio::spawn(server.into_future());
    ready(address);

    let outcome = tokio::select! {
        _ = &mut ended => Err(Error::ModelThread),
        () = signals.next() => Ok(()),
    };
    drop(stop);
    if outcome.is_ok() {
        tokio::select! {
            _ = tokio::time::timeout(limits.grace, &mut server) => {}
            () = signals.next() => {}
        }
    }
    // Whether the thread is still there to be told is what the next line waits for.
    let _ = commands.send(Command::End);
    let joined = tokio::task::spawn_blocking(move || thread.join()).await;
    if !server.is_finished() {
        let _ = tokio::time::timeout(LAST_WORDS, &mut server).await;
    }
    match joined {
        Ok(Ok(())) => outcome,
        _ => Err(Error::ModelThread),
    }
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
