//! Signals, counted: the first asks for an orderly end, the second for an end at once.

use tokio::sync::watch;

/// Hears how often an end was asked for.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<u32>);

/// Asks for an end.
#[derive(Debug, Clone)]
pub struct ShutdownTrigger(watch::Sender<u32>);

impl ShutdownTrigger {
    /// Asks once more.
    pub fn fire(&self) {
        self.0.send_modify(|count| *count = count.saturating_add(1));
    }
}

impl Shutdown {
    /// A trigger and its receiver.
    #[must_use]
    pub fn channel() -> (ShutdownTrigger, Self) {
        let (sender, receiver) = watch::channel(0);
        (ShutdownTrigger(sender), Self(receiver))
    }

    /// Listens to SIGTERM and SIGINT from now on. Call it inside a runtime, before the model is loaded.
    ///
    /// # Errors
    /// If the system does not let us listen.
    pub fn from_signals() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (trigger, shutdown) = Self::channel();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    Some(()) = terminate.recv() => trigger.fire(),
                    Some(()) = interrupt.recv() => trigger.fire(),
                    else => return,
                }
            }
        });
        Ok(shutdown)
    }

    /// Done once an end was asked for `times` times. For ever pending if nobody is left to ask.
    pub async fn signalled(&mut self, times: u32) {
        if self.0.wait_for(|count| *count >= times).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
