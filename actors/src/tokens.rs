//! The limit on tokens over all sequences of a cache, shared by its shards.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;

/// Counts committed tokens against a limit. Forks count the tokens that they share.
#[derive(Debug, Clone)]
pub struct TokenBudget {
    used: Arc<AtomicU64>,
    max_total_tokens: u64,
}

impl TokenBudget {
    /// A budget of `max_total_tokens`.
    pub fn new(max_total_tokens: u64) -> Self {
        TokenBudget { used: Arc::default(), max_total_tokens }
    }

    /// Tokens committed now.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether `tokens` more would fit now. They may not when they are committed: [`TokenBudget::take`] decides.
    pub(crate) fn check(&self, tokens: u64) -> Result<(), Error> {
        self.checked(self.used(), tokens).map(drop)
    }

    fn checked(&self, used: u64, tokens: u64) -> Result<u64, Error> {
        match used.checked_add(tokens) {
            Some(sum) if sum <= self.max_total_tokens => Ok(sum),
            sum => Err(Error::TooManyTokens {
                tokens: sum.unwrap_or(u64::MAX),
                max_total_tokens: self.max_total_tokens,
            }),
        }
    }

    pub(crate) fn take(&self, tokens: u64) -> Result<(), Error> {
        let mut used = self.used();
        loop {
            let sum = self.checked(used, tokens)?;
            match self.used.compare_exchange_weak(used, sum, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(now) => used = now,
            }
        }
    }

    pub(crate) fn give_back(&self, tokens: u64) {
        self.used.fetch_sub(tokens, Ordering::Relaxed);
    }
}
