//! How much one API key may ask for: a bucket of requests and a bucket of tokens, refilled by the minute.
//!
//! A request takes one request and its prompt's tokens when it is admitted, and its answer's tokens when it ends: the
//! bucket may go below zero by what was under way, and nothing is admitted until it is refilled. No clock of its own.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::auth::Tenant;

/// What a key may use in a minute; `None`: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests.
    pub requests_per_minute: Option<u32>,
    /// Tokens, of prompts and answers.
    pub tokens_per_minute: Option<u32>,
}

/// Which limit a request met, and when it can come again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exceeded {
    /// `requests` or `tokens`.
    pub what: &'static str,
    /// The limit of a minute.
    pub limit: u32,
    /// Time until it would pass.
    pub wait: Duration,
}

/// The longest time anybody is asked to wait.
const LONGEST: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone, Copy)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl Bucket {
    fn refill(&mut self, now: Instant, per_minute: u32) {
        let capacity = f64::from(per_minute);
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * capacity / 60.0;
        self.level = (self.level + gained).min(capacity);
        self.at = now;
    }

    /// Time until `amount` is there. More than the bucket holds needs a full bucket, or it could never pass.
    fn wait(&self, per_minute: u32, amount: f64) -> Duration {
        if per_minute == 0 {
            return LONGEST;
        }
        let capacity = f64::from(per_minute);
        let missing = amount.min(capacity) - self.level;
        Duration::from_secs_f64(missing.max(0.0) * 60.0 / capacity).min(LONGEST)
    }
}

#[derive(Debug)]
struct Account {
    requests: Bucket,
    tokens: Bucket,
}

/// The buckets of all keys. There are as many accounts as configured keys, and one for a server without keys.
#[derive(Debug, Default)]
pub struct RateLimiter {
    limits: KeyLimits,
    accounts: HashMap<[u8; 32], Account>,
}

impl RateLimiter {
    /// Full buckets for everybody.
    #[must_use]
    pub fn new(limits: KeyLimits) -> Self {
        Self { limits, accounts: HashMap::new() }
    }

    fn account(&mut self, now: Instant, tenant: Tenant) -> &mut Account {
        let full = |limit: Option<u32>| Bucket { level: limit.map_or(0.0, f64::from), at: now };
        let limits = self.limits;
        let account = self.accounts.entry(tenant.0).or_insert_with(|| Account {
            requests: full(limits.requests_per_minute),
            tokens: full(limits.tokens_per_minute),
        });
        account.requests.refill(now, limits.requests_per_minute.unwrap_or(0));
        account.tokens.refill(now, limits.tokens_per_minute.unwrap_or(0));
        account
    }

    /// Takes one request and `tokens`, or nothing.
    ///
    /// # Errors
    /// The limit that is in the way.
    pub fn admit(&mut self, now: Instant, tenant: Tenant, tokens: u64) -> Result<(), Exceeded> {
        let limits = self.limits;
        let account = self.account(now, tenant);
        let tokens = tokens as f64;
        if let Some(limit) = limits.requests_per_minute {
            let wait = account.requests.wait(limit, 1.0);
            if !wait.is_zero() {
                return Err(Exceeded { what: "requests", limit, wait });
            }
        }
        if let Some(limit) = limits.tokens_per_minute {
            let wait = account.tokens.wait(limit, tokens);
            if !wait.is_zero() {
                return Err(Exceeded { what: "tokens", limit, wait });
            }
        }
        account.requests.level -= 1.0;
        account.tokens.level -= tokens;
        Ok(())
    }

    /// Gives back what a request took that was then refused for another reason.
    pub fn refund(&mut self, now: Instant, tenant: Tenant, tokens: u64) {
        let account = self.account(now, tenant);
        account.requests.level += 1.0;
        account.tokens.level += tokens as f64;
    }

    /// Takes the tokens of an answer that was given.
    pub fn spend(&mut self, now: Instant, tenant: Tenant, tokens: u64) {
        if self.limits.tokens_per_minute.is_some() {
            self.account(now, tenant).tokens.level -= tokens as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Tenant = Tenant([1; 32]);
    const B: Tenant = Tenant([2; 32]);

    fn limiter(requests: Option<u32>, tokens: Option<u32>) -> RateLimiter {
        RateLimiter::new(KeyLimits { requests_per_minute: requests, tokens_per_minute: tokens })
    }

    #[test]
    fn requests_are_refilled() {
        let (mut limiter, start) = (limiter(Some(2), None), Instant::now());
        assert!(limiter.admit(start, A, 9999).is_ok());
        assert!(limiter.admit(start, A, 9999).is_ok());
        let exceeded = limiter.admit(start, A, 0).unwrap_err();
        assert_eq!((exceeded.what, exceeded.limit, exceeded.wait.as_secs()), ("requests", 2, 30));
        assert!(limiter.admit(start, B, 0).is_ok(), "another key has its own");
        assert!(limiter.admit(start + Duration::from_secs(29), A, 0).is_err());
        assert!(limiter.admit(start + Duration::from_secs(31), A, 0).is_ok());
    }

    #[test]
    fn answers_are_paid_for_afterwards() {
        let (mut limiter, start) = (limiter(None, Some(600)), Instant::now());
        assert!(limiter.admit(start, A, 100).is_ok());
        limiter.spend(start, A, 800);
        let exceeded = limiter.admit(start, A, 1).unwrap_err();
        assert_eq!((exceeded.what, exceeded.wait.as_secs()), ("tokens", 30));
        assert!(limiter.admit(start + Duration::from_secs(31), A, 1).is_ok());
    }

    #[test]
    fn what_is_larger_than_the_bucket_needs_a_full_one() {
        let (mut limiter, start) = (limiter(None, Some(60)), Instant::now());
        assert!(limiter.admit(start, A, 100).is_ok());
        assert!(limiter.admit(start + Duration::from_secs(60), A, 100).is_err());
        assert!(limiter.admit(start + Duration::from_secs(101), A, 100).is_ok());
    }

    #[test]
    fn what_was_refused_elsewhere_is_given_back() {
        let (mut limiter, start) = (limiter(Some(1), Some(10)), Instant::now());
        assert!(limiter.admit(start, A, 10).is_ok());
        limiter.refund(start, A, 10);
        assert!(limiter.admit(start, A, 10).is_ok());
        assert!(limiter.admit(start, A, 0).is_err());
    }

    #[test]
    fn a_limit_of_nothing_lets_nothing_through() {
        let (mut limiter, start) = (limiter(Some(0), None), Instant::now());
        let exceeded = limiter.admit(start, A, 0).unwrap_err();
        assert_eq!(exceeded.wait, Duration::from_secs(3600));
    }
}
