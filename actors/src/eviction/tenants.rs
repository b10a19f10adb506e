//! Whose candidates are whose: the order of each tenant's own, and tenants whose blocks must not go for others.
//!
//! An order of its own costs a list to keep, beside the ranking. Only tenants have one whose blocks may have to go for each other.
//!
//! The candidates of a protected tenant leave the ranking one at a time, when they come up as victims, and are *parked*.
//! When the tenant is not protected any more, they go back a few per victim. So switching costs nothing, however often a
//! tenant crosses its reserve.

use std::collections::BTreeMap;

use super::queue::{Links, List};
use super::{NONE, Node, PASSED};

/// How far a candidate that comes late is carried towards its place in the order of its tenant.
const STEPS_MAX: usize = 8;

/// A block's place among the candidates of its tenant.
#[derive(Debug, Clone)]
struct Member {
    prev: u32,
    next: u32,
}

impl Links for Member {
    fn prev(&mut self) -> &mut u32 {
        &mut self.prev
    }

    fn next(&mut self) -> &mut u32 {
        &mut self.next
    }
}

#[derive(Debug, Default)]
struct Tenant {
    number: u32,
    blocks: usize,
    /// Whether `candidates` is kept.
    is_ordered: bool,
    /// Its candidates, by last use.
    candidates: List,
    /// Those that are not in the ranking.
    parked: List,
    is_protected: bool,
    is_returning: bool,
}

/// The tenants that have blocks or protection.
#[derive(Debug)]
pub(super) struct Tenants {
    members: Vec<Member>,
    tenants: Vec<Tenant>,
    indexes: BTreeMap<u32, u32>,
    unused: Vec<u32>,
    /// Tenants whose parked blocks go back to the ranking.
    returning: Vec<u32>,
}

impl Tenants {
    pub(super) fn new(blocks: usize) -> Self {
        Tenants {
            members: vec![Member { prev: NONE, next: NONE }; blocks],
            tenants: Vec::new(),
            indexes: BTreeMap::new(),
            unused: Vec::new(),
            returning: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.members[..]) + size_of_val(&self.tenants[..])
    }

    #[inline]
    fn index(&mut self, number: u32) -> u32 {
        // Most often there are few, and the first is asked for.
        if let Some(tenant) = self.tenants.first()
            && tenant.number == number
            && tenant.blocks > 0
        {
            return 0;
        }
        self.index_of(number)
    }

    #[inline(never)]
    fn index_of(&mut self, number: u32) -> u32 {
        *self.indexes.entry(number).or_insert_with(|| {
            let index = self.unused.pop().unwrap_or_else(|| {
                self.tenants.push(Tenant::default());
                self.tenants.len() as u32 - 1
            });
            self.tenants[index as usize].number = number;
            index
        })
    }

    /// The index of the tenant of a block that is cached now.
    #[inline]
    pub(super) fn inserted(&mut self, tenant: u32) -> u32 {
        let index = self.index(tenant);
        self.tenants[index as usize].blocks += 1;
        index
    }

    #[inline]
    pub(super) fn removed(&mut self, index: u32) {
        self.tenants[index as usize].blocks -= 1;
        self.forget(index);
    }

    #[inline]
    fn forget(&mut self, index: u32) {
        let tenant = &self.tenants[index as usize];
        let is_needed = tenant.blocks > 0 || tenant.is_protected || tenant.is_ordered;
        if !is_needed && self.indexes.remove(&tenant.number).is_some() {
            self.unused.push(index);
        }
    }

    /// Keeps an order of the tenant's own candidates from now on. Looks at all blocks if it has some already.
    pub(super) fn order(&mut self, nodes: &[Node], tenant: u32) {
        let index = self.index(tenant);
        let (of_tenant, members) = (&mut self.tenants[index as usize], &mut self.members);
        if std::mem::replace(&mut of_tenant.is_ordered, true) || of_tenant.blocks == 0 {
            return;
        }
        let is_listed = |node: &Node| node.tenant == index && node.is_candidate() && !node.is(PASSED);
        let mut listed: Vec<u32> =
            (0..).zip(nodes).filter(|(_, node)| is_listed(node)).map(|(at, _)| at).collect();
        listed.sort_unstable_by_key(|block| nodes[*block as usize].used);
        listed.into_iter().for_each(|block| of_tenant.candidates.push_back(members, block));
    }

    /// A block has become a candidate.
    #[inline]
    pub(super) fn enter(&mut self, nodes: &[Node], block: u32) {
        let tenant = nodes[block as usize].tenant;
        if self.tenants[tenant as usize].is_ordered {
            self.enter_order(nodes, tenant, block);
        }
    }

    #[inline(never)]
    fn enter_order(&mut self, nodes: &[Node], tenant: u32, block: u32) {
        let Tenants { members, tenants, .. } = self;
        let list = &mut tenants[tenant as usize].candidates;
        let used = nodes[block as usize].used;
        if list.back().is_none_or(|back| nodes[back as usize].used < used) {
            return list.push_back(members, block);
        }
        let mut before = list.front();
        for _ in 0..STEPS_MAX {
            match before {
                Some(older) if nodes[older as usize].used < used => before = list.after(members, older),
                _ => break,
            }
        }
        list.insert(members, block, before);
    }

    /// A block is no candidate any more.
    #[inline]
    pub(super) fn leave(&mut self, nodes: &[Node], block: u32) {
        let tenant = nodes[block as usize].tenant;
        if self.tenants[tenant as usize].is_ordered {
            self.leave_order(tenant, block);
        }
    }

    #[inline(never)]
    fn leave_order(&mut self, tenant: u32, block: u32) {
        self.tenants[tenant as usize].candidates.remove(&mut self.members, block);
    }

    /// The candidate of the tenant that was used longest ago, if its candidates are [ordered](Tenants::order).
    pub(super) fn first(&self, tenant: u32) -> Option<u32> {
        self.tenants[*self.indexes.get(&tenant)? as usize].candidates.front()
    }

    pub(super) fn protect(&mut self, tenant: u32, is_protected: bool) {
        if !is_protected && !self.indexes.contains_key(&tenant) {
            return;
        }
        let index = self.index(tenant);
        let tenant = &mut self.tenants[index as usize];
        tenant.is_protected = is_protected;
        if !is_protected && tenant.parked.front().is_some() && !tenant.is_returning {
            tenant.is_returning = true;
            self.returning.push(index);
        }
        self.forget(index);
    }

    #[inline]
    pub(super) fn is_protected(&self, nodes: &[Node], block: u32) -> bool {
        self.tenants[nodes[block as usize].tenant as usize].is_protected
    }

    pub(super) fn park(&mut self, nodes: &mut [Node], block: u32) {
        self.tenants[nodes[block as usize].tenant as usize].parked.push_back(nodes, block);
    }

    pub(super) fn unpark(&mut self, nodes: &mut [Node], block: u32) {
        self.tenants[nodes[block as usize].tenant as usize].parked.remove(nodes, block);
    }

    /// Whether there may be parked blocks that need not be so any more.
    #[inline]
    pub(super) fn are_returning(&self) -> bool {
        !self.returning.is_empty()
    }

    /// A parked block that need not be so any more.
    pub(super) fn returning(&mut self, nodes: &mut [Node]) -> Option<u32> {
        while let Some(&index) = self.returning.last() {
            let tenant = &mut self.tenants[index as usize];
            if !tenant.is_protected
                && let Some(block) = tenant.parked.pop_front(nodes)
            {
                return Some(block);
            }
            tenant.is_returning = false;
            self.returning.pop();
        }
        None
    }
}
