//! What tenants may use of a device's memory, and what is kept for them: a ledger of bytes, by owner.

use serde::{Deserialize, Serialize};

/// Bounds of one tenant, in bytes of each device's slab. Blocks of a [shared domain](crate::sequence::OpenOptions::shared_domain) are not the tenant's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TenantLimits {
    /// The most that the tenant's blocks may take, cached ones included: beyond it his own cached blocks are re-encoded to smaller formats,
    /// if the cache has some, then they make way, and then his writes are refused. None: no bound.
    pub quota_bytes: Option<u64>,
    /// What others leave to the tenant: they do not write into what is missing of it, and while his blocks take no more than this his
    /// cached ones are not evicted for them.
    pub reserve_bytes: u64,
}

#[derive(Debug, Default)]
struct Account {
    used_bytes: u64,
    /// Of those, what nobody holds.
    cached_bytes: u64,
    /// Flights that seal, re-encode or move a block. They hold it, and leave it cached or smaller.
    flights: u32,
    limits: TenantLimits,
}

/// Counts the bytes of everybody's blocks.
#[derive(Debug, Default)]
pub struct Ledger {
    /// By owner number.
    accounts: Vec<Account>,
    /// What is missing of all reserves.
    unfilled_bytes: u64,
    /// What nobody holds, of all owners.
    cached_bytes: u64,
    /// Of that, what is protected: it does not go for others.
    protected_bytes: u64,
}

impl Account {
    fn unfilled_bytes(&self) -> u64 {
        self.limits.reserve_bytes.saturating_sub(self.used_bytes)
    }
}

/// A sum of bytes after a change. No more goes than has come.
#[inline]
fn changed(sum: u64, change: i64) -> u64 {
    debug_assert!(sum.checked_add_signed(change).is_some(), "{sum} bytes, and {change}");
    sum.wrapping_add_signed(change)
}

impl Ledger {
    /// A new owner, with the next number. Returns whether his cached blocks are protected: from the beginning, if something is reserved for him.
    pub fn open(&mut self, limits: TenantLimits) -> bool {
        let account = Account { limits, ..Account::default() };
        let is_protected = account.is_protected();
        self.unfilled_bytes += account.unfilled_bytes();
        self.accounts.push(account);
        is_protected
    }

    /// Changes what an owner uses, and returns whether his cached blocks are protected from now on, if that has changed.
    #[inline]
    pub fn change(&mut self, owner: u32, bytes: i64) -> Option<bool> {
        let account = &mut self.accounts[owner as usize];
        if account.limits.reserve_bytes == 0 {
            // Most have none: nothing is missing of it, before or after.
            account.used_bytes = changed(account.used_bytes, bytes);
            return None;
        }
        let (was_protected, unfilled) = (account.is_protected(), account.unfilled_bytes());
        account.used_bytes = changed(account.used_bytes, bytes);
        self.unfilled_bytes = self.unfilled_bytes - unfilled + account.unfilled_bytes();
        let is_protected = account.is_protected();
        if was_protected == is_protected {
            return None;
        }
        match is_protected {
            true => self.protected_bytes += account.cached_bytes,
            false => self.protected_bytes -= account.cached_bytes,
        }
        Some(is_protected)
    }

    /// Changes how much of what an owner uses is held by nobody.
    #[inline]
    pub fn change_cached(&mut self, owner: u32, bytes: i64) {
        let account = &mut self.accounts[owner as usize];
        account.cached_bytes = changed(account.cached_bytes, bytes);
        if account.is_protected() {
            self.protected_bytes = changed(self.protected_bytes, bytes);
        }
        self.cached_bytes = changed(self.cached_bytes, bytes);
    }

    /// A flight holds one of an owner's blocks (1), or no more (-1).
    pub fn change_flights(&mut self, owner: u32, flights: i32) {
        let account = &mut self.accounts[owner as usize];
        account.flights = account.flights.saturating_add_signed(flights);
    }

    /// Flights that hold an owner's blocks.
    pub fn flights_of(&self, owner: u32) -> u32 {
        self.accounts[owner as usize].flights
    }

    /// Bytes of all owners that nobody holds.
    pub fn cached_bytes(&self) -> u64 {
        self.cached_bytes
    }

    /// Bytes that nobody holds and that may go for an owner: all but those of others who are protected.
    pub fn evictable_bytes(&self, owner: u32) -> u64 {
        let account = &self.accounts[owner as usize];
        let own = if account.is_protected() { account.cached_bytes } else { 0 };
        self.cached_bytes - self.protected_bytes + own
    }

    /// Whether there is what nobody holds, and all of it is protected.
    pub fn is_all_protected(&self) -> bool {
        self.protected_bytes > 0 && self.protected_bytes == self.cached_bytes
    }

    /// Bytes of an owner that nobody holds.
    pub fn cached_bytes_of(&self, owner: u32) -> u64 {
        self.accounts[owner as usize].cached_bytes
    }

    /// Bytes that an owner uses.
    pub fn used_bytes(&self, owner: u32) -> u64 {
        self.accounts[owner as usize].used_bytes
    }

    /// Bytes that an owner may still use; none: as many as there are.
    pub fn quota_left_bytes(&self, owner: u32) -> Option<u64> {
        let Account { used_bytes, limits, .. } = &self.accounts[owner as usize];
        Some(limits.quota_bytes?.saturating_sub(*used_bytes))
    }

    /// The quota of an owner.
    pub fn quota_bytes(&self, owner: u32) -> Option<u64> {
        self.accounts[owner as usize].limits.quota_bytes
    }

    /// Bytes that are left to others than this owner, and vacant.
    pub fn promised_to_others_bytes(&self, owner: u32) -> u64 {
        self.unfilled_bytes - self.accounts[owner as usize].unfilled_bytes()
    }
}

impl Account {
    fn is_protected(&self) -> bool {
        self.limits.reserve_bytes > 0 && self.used_bytes <= self.limits.reserve_bytes
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn reserves_and_quotas_follow_what_is_used() {
        let mut ledger = Ledger::default();
        assert!(!ledger.open(TenantLimits::default()));
        assert!(
            ledger.open(TenantLimits { quota_bytes: Some(100), reserve_bytes: 40 }),
            "from the beginning"
        );
        assert_eq!((ledger.promised_to_others_bytes(0), ledger.promised_to_others_bytes(1)), (40, 0));
        assert_eq!(ledger.change(0, 500), None);
        assert_eq!(ledger.change(1, 30), None, "still within its reserve");
        ledger.change_cached(1, 20);
        ledger.change_cached(0, 7);
        assert_eq!((ledger.evictable_bytes(0), ledger.evictable_bytes(1)), (7, 27));
        assert_eq!((ledger.promised_to_others_bytes(0), ledger.quota_left_bytes(1)), (10, Some(70)));
        assert_eq!(ledger.change(1, 80), Some(false));
        assert_eq!((ledger.evictable_bytes(0), ledger.evictable_bytes(1)), (27, 27));
        assert_eq!((ledger.promised_to_others_bytes(0), ledger.quota_left_bytes(1)), (0, Some(0)));
        assert_eq!(ledger.change(1, -110), Some(true));
        assert_eq!(ledger.evictable_bytes(0), 7);
        assert_eq!((ledger.promised_to_others_bytes(0), ledger.quota_left_bytes(0)), (40, None));
    }
}
