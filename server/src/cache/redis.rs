//! Answers in a Redis that several servers may share. It is asked with little patience: a request never waits longer for
//! it than [`PATIENCE`], and after a failure it is left alone for a moment.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use redis::{AsyncCommands, Client, aio::ConnectionManager};
use tokio::{sync::OnceCell, time::timeout};

use super::{CacheKey, Stored};

/// Time a request waits for Redis at most.
const PATIENCE: Duration = Duration::from_millis(100);
/// After a failure nobody asks for so long.
const REST: Duration = Duration::from_secs(1);

pub(super) struct Redis {
    client: Client,
    connection: OnceCell<ConnectionManager>,
    ttl: Duration,
    /// When it failed last. A lock, because any request may find out.
    failed: Mutex<Option<Instant>>,
}

impl Redis {
    pub(super) fn new(url: &str, ttl: Duration) -> Result<Self, String> {
        // The error names the address's fault and not its password.
        let client = Client::open(url).map_err(|error| error.to_string())?;
        Ok(Self { client, connection: OnceCell::new(), ttl, failed: Mutex::new(None) })
    }

    fn name(key: &CacheKey) -> String {
        format!("ingle:response:{}", key.hex())
    }

    pub(super) async fn get(&self, key: &CacheKey) -> Result<Option<Stored>, String> {
        let bytes: Option<Vec<u8>> =
            self.ask(async |mut connection| connection.get(Self::name(key)).await).await?;
        Ok(bytes.and_then(Stored::from_bytes))
    }

    pub(super) async fn put(&self, key: &CacheKey, stored: &Stored) -> Result<(), String> {
        let seconds = self.ttl.as_secs().max(1);
        self.ask(async |mut connection| connection.set_ex(Self::name(key), stored.to_bytes(), seconds).await)
            .await
    }

    async fn ask<T>(
        &self,
        work: impl AsyncFnOnce(ConnectionManager) -> redis::RedisResult<T>,
    ) -> Result<T, String> {
        let failed = *self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_some_and(|at| at.elapsed() < REST) {
            return Err("it failed a moment ago".to_owned());
        }
        let asked = timeout(PATIENCE, async {
            let connect = || ConnectionManager::new(self.client.clone());
            let connection = self.connection.get_or_try_init(connect).await?.clone();
            work(connection).await
        });
        let result = match asked.await {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(_) => Err("it did not answer in time".to_owned()),
        };
        let now = result.is_err().then(Instant::now);
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = now;
        result
    }
}
