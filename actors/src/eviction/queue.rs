//! Orders of blocks, linked through their nodes: a list, a heap, and the two together.

use super::{NONE, Node};

/// What a list runs through.
pub(super) trait Links {
    fn prev(&mut self) -> &mut u32;
    fn next(&mut self) -> &mut u32;
}

impl Links for Node {
    fn prev(&mut self) -> &mut u32 {
        &mut self.prev
    }

    fn next(&mut self) -> &mut u32 {
        &mut self.next
    }
}

/// A doubly linked list.
#[derive(Debug)]
pub(super) struct List {
    front: u32,
    back: u32,
}

impl Default for List {
    fn default() -> Self {
        List { front: NONE, back: NONE }
    }
}

impl List {
    pub(super) fn front(&self) -> Option<u32> {
        (self.front != NONE).then_some(self.front)
    }

    pub(super) fn back(&self) -> Option<u32> {
        (self.back != NONE).then_some(self.back)
    }

    pub(super) fn after<N: Links>(&self, nodes: &mut [N], block: u32) -> Option<u32> {
        let next = *nodes[block as usize].next();
        (next != NONE).then_some(next)
    }

    #[inline]
    pub(super) fn push_back<N: Links>(&mut self, nodes: &mut [N], block: u32) {
        self.insert(nodes, block, None);
    }

    #[inline]
    pub(super) fn push_front<N: Links>(&mut self, nodes: &mut [N], block: u32) {
        self.insert(nodes, block, self.front());
    }

    /// Puts a block before another, or at the end.
    #[inline]
    pub(super) fn insert<N: Links>(&mut self, nodes: &mut [N], block: u32, before: Option<u32>) {
        let next = before.unwrap_or(NONE);
        let prev = match next {
            NONE => std::mem::replace(&mut self.back, block),
            next => std::mem::replace(nodes[next as usize].prev(), block),
        };
        match prev {
            NONE => self.front = block,
            prev => *nodes[prev as usize].next() = block,
        }
        *nodes[block as usize].prev() = prev;
        *nodes[block as usize].next() = next;
    }

    pub(super) fn remove<N: Links>(&mut self, nodes: &mut [N], block: u32) {
        let (prev, next) = (*nodes[block as usize].prev(), *nodes[block as usize].next());
        match prev {
            NONE => self.front = next,
            prev => *nodes[prev as usize].next() = next,
        }
        match next {
            NONE => self.back = prev,
            next => *nodes[next as usize].prev() = prev,
        }
    }

    #[inline]
    pub(super) fn pop_front<N: Links>(&mut self, nodes: &mut [N]) -> Option<u32> {
        let block = self.front()?;
        self.remove(nodes, block);
        Some(block)
    }
}

/// A binary heap, least key first. Every block in it knows its place, so that it can leave from anywhere. Most are in lists instead: nothing of
/// this is inlined into what they run through.
#[derive(Debug, Default)]
pub(super) struct Heap {
    order: Vec<(u64, u32)>,
}

impl Heap {
    pub(super) fn first(&self) -> Option<(u64, u32)> {
        self.order.first().copied()
    }

    #[inline(never)]
    pub(super) fn push(&mut self, nodes: &mut [Node], key: u64, block: u32) {
        self.order.push((key, block));
        self.up(nodes, self.order.len() - 1);
    }

    #[inline(never)]
    pub(super) fn remove(&mut self, nodes: &mut [Node], block: u32) {
        let place = nodes[block as usize].prev as usize;
        self.order.swap_remove(place);
        if place < self.order.len() {
            // What has come from the end may belong above or below.
            self.up(nodes, place);
            let moved = self.order[place].1;
            self.down(nodes, nodes[moved as usize].prev as usize);
        }
    }

    fn up(&mut self, nodes: &mut [Node], mut place: usize) {
        let moved = self.order[place];
        while place > 0 && self.order[(place - 1) / 2] > moved {
            self.put(nodes, place, self.order[(place - 1) / 2]);
            place = (place - 1) / 2;
        }
        self.put(nodes, place, moved);
    }

    fn down(&mut self, nodes: &mut [Node], mut place: usize) {
        let moved = self.order[place];
        loop {
            let (left, right) = (2 * place + 1, 2 * place + 2);
            let Some(&first) = self.order.get(left) else { break };
            let (child, least) = match self.order.get(right) {
                Some(&second) if second < first => (right, second),
                _ => (left, first),
            };
            if least >= moved {
                break;
            }
            self.put(nodes, place, least);
            place = child;
        }
        self.put(nodes, place, moved);
    }

    fn put(&mut self, nodes: &mut [Node], place: usize, entry: (u64, u32)) {
        self.order[place] = entry;
        nodes[entry.1 as usize].prev = place as u32;
    }
}

const IN_LIST: u8 = 0;
const IN_HEAP: u8 = 1;

/// Blocks by last use, the oldest first.
///
/// Blocks that have just been let go of go to the end of a list, which is thereby in order. A block that becomes a candidate
/// later, because the last of its children has gone, is most often older than all of the list; if it is not, a heap holds it.
#[derive(Debug, Default)]
pub(super) struct Queue {
    list: List,
    late: Heap,
    len: usize,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(super) fn push(&mut self, nodes: &mut [Node], block: u32) {
        let used = nodes[block as usize].used;
        self.len += 1;
        nodes[block as usize].list = IN_LIST;
        if self.list.front().is_none_or(|front| used < nodes[front as usize].used) {
            self.list.push_front(nodes, block);
        } else if used > nodes[self.list.back as usize].used {
            self.list.push_back(nodes, block);
        } else {
            nodes[block as usize].list = IN_HEAP;
            self.late.push(nodes, used, block);
        }
    }

    #[inline]
    pub(super) fn remove(&mut self, nodes: &mut [Node], block: u32) {
        self.len -= 1;
        match nodes[block as usize].list {
            IN_LIST => self.list.remove(nodes, block),
            _ => self.late.remove(nodes, block),
        }
    }

    #[inline]
    pub(super) fn first(&self, nodes: &[Node]) -> Option<u32> {
        match (self.list.front(), self.late.first()) {
            (Some(front), Some((used, late))) => {
                Some(if used < nodes[front as usize].used { late } else { front })
            }
            (front, late) => front.or(late.map(|(_, block)| block)),
        }
    }
}
