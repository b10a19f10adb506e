//! Opening a sequence: finding what of its prompt is cached, making the room that it reserves, giving it its place.

use smallvec::SmallVec;

use super::blocks::BlockStore;
use super::cached::Room;
use super::core::{DeviceCore, Effects, Owner, Progress, Root};
use super::entry::{Rest, SequenceEntry, Sharing};
use crate::batch::{Operation, Outcome};
use crate::block::BlockId;
use crate::error::Error;
use crate::memory::OpRef;
use crate::pool::SizeClass;
use crate::prefix::{Prefix, blocks_to_match};
use crate::sequence::{OpenOptions, Prompt, SequenceShared, SequenceState};

impl DeviceCore {
    /// Opens a sequence with what of its prompt is cached.
    pub(super) fn open(&mut self, op: OpRef, effects: &mut Effects) -> Progress {
        let Operation::Open { options, prefix, permit } =
            &mut self.pending.submission_mut(op).operations[op.index as usize]
        else {
            return Progress::Flying;
        };
        let (options, mut prefix, permit) = (std::mem::take(&mut **options), prefix.take(), permit.take());
        let layout = self.config.layout;
        let owner = match &options.shared_domain {
            None => Owner::Tenant(options.tenant.clone()),
            Some(domain) => Owner::Domain(domain.clone()),
        };
        let tenant = self.owner_number(&owner);
        // Tokens computed after dropping depend on more than their ids.
        let prompt = options.prompt.as_ref().filter(|_| self.config.dropping.is_none());
        let sharing = prompt.zip(prefix.as_deref()).map(|(prompt, prefix)| {
            let (tenant, adapter) = (options.tenant.clone(), options.adapter.clone());
            Sharing {
                root: prefix.root,
                root_number: self.root_number(Root { owner, tenant, adapter }),
                prompt_blocks: layout.blocks_for(prompt.token_ids.len()) as u32,
                retention: options.retention.clone(),
            }
        });
        let (found, tokens) = match (&sharing, prompt, &prefix) {
            (Some(sharing), Some(prompt), Some(prefix)) => {
                self.find_prefix(&options, prompt, prefix, sharing)
            }
            _ => Default::default(),
        };
        // What it has pinned and does not hold may go from now on.
        if let Some(prefix) = &mut prefix {
            prefix.lease = None;
        }
        self.blocks.pins_dropped();
        // A block that matches in part is copied by the first write.
        let whole = tokens as usize / layout.block_tokens;
        let reserved = layout.blocks_for(options.reserve_tokens as usize).saturating_sub(whole);
        let refused = match self.make_room(op, tenant, reserved) {
            Room::Now => self.config.token_budget.take(u64::from(tokens)).err(),
            Room::Soon => {
                // It starts anew when there is room, and looks again then.
                found.iter().for_each(|&block| self.blocks.release(block));
                if let Operation::Open { options: place, prefix: found, permit: right } =
                    &mut self.pending.submission_mut(op).operations[op.index as usize]
                {
                    (**place, *found, *right) = (options, prefix, permit);
                }
                return Progress::Flying;
            }
            Room::Never => Some(self.capacity_error(tenant, reserved, 0)),
        };
        if let Some(error) = refused {
            found.iter().for_each(|&block| self.blocks.release(block));
            return Progress::Done(Err(error));
        }
        let has_room = self.blocks.pool_mut().reserve_raw(reserved);
        debug_assert!(has_room, "there was room a moment ago");
        self.blocks.charge(tenant, SizeClass::Raw, reserved as i64);
        if let Some(prefix) = prefix {
            self.counters.prefix_blocks_asked += prefix.keys.len() as u64;
            self.counters.prefix_blocks_hit += whole as u64;
            self.counters.prefix_tokens_hit += u64::from(tokens);
        }
        let extra = options.prompt.map_or_else(Vec::new, |prompt| prompt.extra);
        let extra = extra.into_iter().filter(|(at, _)| *at < tokens).collect();
        let state = SequenceState { committed: tokens, blocks: found, ..SequenceState::default() };
        let mut rest = Rest::new(tenant, sharing, reserved, extra, permit);
        self.blocks.follow(&mut rest.tail, &state);
        let make = |id| SequenceEntry::new(SequenceShared::new(id, options.tenant, state), rest, &layout);
        Progress::Done(Ok(Outcome::Opened(self.register(make, effects))))
    }

    /// Holds the cached blocks that a prompt begins with, and says how many tokens that are. The last of them may match in part.
    fn find_prefix(
        &mut self,
        options: &OpenOptions,
        prompt: &Prompt,
        prefix: &Prefix,
        sharing: &Sharing,
    ) -> (SmallVec<[BlockId; 6]>, u32) {
        let block_tokens = self.config.layout.block_tokens;
        let hold = |blocks: &mut BlockStore, at: usize, block| {
            blocks.hold_found(block, (at as u32, sharing.prompt_blocks));
            blocks.set_retention(block, &sharing.retention, (at * block_tokens) as u32);
        };
        let mut found = prefix.lease.as_ref().map(|lease| self.blocks.leased(lease)).unwrap_or_default();
        found.iter().enumerate().for_each(|(at, &block)| hold(&mut self.blocks, at, block));
        // What was published since is found here.
        let wanted = blocks_to_match(options, prompt, block_tokens);
        for (at, key) in prefix.keys[..wanted].iter().enumerate().skip(found.len()) {
            let Some(block) = self.blocks.find_key(key) else { break };
            hold(&mut self.blocks, at, block);
            found.push(block);
        }
        let start = found.len() * block_tokens;
        let end = prompt.token_ids.len().saturating_sub(usize::from(!options.whole_prompt));
        let rest = &prompt.token_ids[start..end.min(start + block_tokens).max(start)];
        let is_plain = |at: usize| !prompt.extra.iter().any(|(position, _)| *position as usize == start + at);
        let plain = (0..rest.len()).take_while(|&at| is_plain(at)).count();
        let partial = self.blocks.find_partial(found.last().copied(), sharing.root_number, &rest[..plain]);
        let Some((block, tokens)) = partial else { return (found, start as u32) };
        hold(&mut self.blocks, found.len(), block);
        found.push(block);
        (found, (start + tokens) as u32)
    }

    /// `needed` raw blocks are not to be had, beside `had` that were set aside for the purpose.
    pub(super) fn capacity_error(&mut self, owner: u32, needed: usize, had: usize) -> Error {
        if let Some(error) = self.blocks.beyond_quota(owner, needed) {
            return error;
        }
        let promised = self.blocks.with_promises(owner, 0);
        let free = self.blocks.raw_available(needed + promised).saturating_sub(promised) + had;
        let evictable = self.blocks.evictor.unheld() as u32;
        Error::Capacity { needed: (needed + had) as u32, free: free as u32, evictable }
    }
}
