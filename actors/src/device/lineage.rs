//! Which published block continues which: a forest, with the blocks of a root's sequences for its trees.

use crate::block::BlockId;

#[derive(Debug, Clone, Copy)]
struct Links {
    parent: BlockId,
    root: u32,
    first_child: BlockId,
    /// Among the children of the parent, or the first blocks of the root.
    next: BlockId,
    previous: BlockId,
}

const NONE: BlockId = BlockId::DROPPED;
const UNLINKED: Links = Links { parent: NONE, root: 0, first_child: NONE, next: NONE, previous: NONE };

/// Parents, children and roots of published blocks.
#[derive(Debug)]
pub(super) struct Lineage {
    links: Vec<Links>,
    /// One of the first blocks of each root's sequences.
    of_root: Vec<BlockId>,
}

impl Lineage {
    pub(super) fn new(blocks: usize) -> Self {
        Lineage { links: vec![UNLINKED; blocks], of_root: Vec::new() }
    }

    fn links(&self, block: BlockId) -> &Links {
        &self.links[block.0 as usize]
    }

    fn links_mut(&mut self, block: BlockId) -> &mut Links {
        &mut self.links[block.0 as usize]
    }

    /// Where the list of a block's siblings begins.
    #[inline]
    fn siblings(&mut self, parent: BlockId, root: u32) -> &mut BlockId {
        if parent != NONE {
            return &mut self.links[parent.0 as usize].first_child;
        }
        let root = root as usize;
        if self.of_root.len() <= root {
            self.of_root.resize(root + 1, NONE);
        }
        &mut self.of_root[root]
    }

    /// A block is published behind `parent`.
    #[inline]
    pub(super) fn insert(&mut self, block: BlockId, parent: Option<BlockId>, root: u32) {
        let parent = parent.unwrap_or(NONE);
        let next = std::mem::replace(self.siblings(parent, root), block);
        if next != NONE {
            self.links_mut(next).previous = block;
        }
        *self.links_mut(block) = Links { parent, root, next, ..UNLINKED };
    }

    /// A block is published no more. No published block continues it.
    #[inline]
    pub(super) fn remove(&mut self, block: BlockId) {
        let Links { parent, root, next, previous, .. } = *self.links(block);
        match previous {
            NONE => *self.siblings(parent, root) = next,
            previous => self.links_mut(previous).next = next,
        }
        if next != NONE {
            self.links_mut(next).previous = previous;
        }
    }

    /// The number of a published block's root.
    pub(super) fn root(&self, block: BlockId) -> u32 {
        self.links(block).root
    }

    /// The published blocks before a published block, from the nearest on.
    pub(super) fn ancestors(&self, block: BlockId) -> impl Iterator<Item = BlockId> {
        let parent_of = |block: &BlockId| Some(self.links(*block).parent).filter(|parent| *parent != NONE);
        std::iter::successors(parent_of(&block), parent_of)
    }

    /// How long the way from the first block to each of some published blocks is. Every block on these ways is looked at once: there may
    /// be as many as there are blocks, each with thousands before it.
    pub(super) fn depths(&self, blocks: &[BlockId]) -> Vec<u32> {
        // 0: not known yet.
        let mut depths = vec![0; self.links.len()];
        let mut way = Vec::new();
        for &block in blocks {
            let mut depth = 0;
            for at in std::iter::once(block).chain(self.ancestors(block)) {
                depth = depths[at.0 as usize];
                if depth > 0 {
                    break;
                }
                way.push(at);
            }
            for at in way.drain(..).rev() {
                depth += 1;
                depths[at.0 as usize] = depth;
            }
        }
        blocks.iter().map(|block| depths[block.0 as usize]).collect()
    }

    /// The published blocks that continue `parent`, or begin sequences of the root. The latest comes first.
    pub(super) fn children(&self, parent: Option<BlockId>, root: u32) -> impl Iterator<Item = BlockId> {
        let first = match parent {
            Some(parent) => self.links(parent).first_child,
            None => self.of_root.get(root as usize).copied().unwrap_or(NONE),
        };
        let some = |block: BlockId| (block != NONE).then_some(block);
        std::iter::successors(some(first), move |block| some(self.links(*block).next))
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn children_and_ancestors_follow_what_is_published() {
        let mut lineage = Lineage::new(8);
        let [a, b, c, d] = [0, 1, 2, 3].map(BlockId);
        lineage.insert(a, None, 5);
        lineage.insert(b, Some(a), 5);
        lineage.insert(c, Some(a), 5);
        lineage.insert(d, Some(c), 5);
        let children = |lineage: &Lineage, of| lineage.children(of, 5).collect::<Vec<_>>();
        assert_eq!((children(&lineage, None), children(&lineage, Some(a))), (vec![a], vec![c, b]));
        assert_eq!(lineage.ancestors(d).collect::<Vec<_>>(), [c, a]);
        assert_eq!(lineage.root(d), 5);
        lineage.remove(d);
        lineage.remove(c);
        assert_eq!(children(&lineage, Some(a)), [b]);
        lineage.insert(c, Some(a), 5);
        lineage.remove(b);
        assert_eq!(children(&lineage, Some(a)), [c]);
        lineage.remove(c);
        lineage.remove(a);
        assert_eq!((children(&lineage, None), lineage.children(None, 9).count()), (vec![], 0));
    }
    #[test]
    fn depths_are_the_lengths_of_the_ways() {
        // Two trees, their blocks numbered against the order of the ways.
        let parents = [Some(3), Some(0), Some(3), None, Some(1), None, Some(5)];
        let mut lineage = Lineage::new(parents.len());
        for block in [3, 0, 1, 2, 4, 5, 6] {
            lineage.insert(BlockId(block), parents[block as usize].map(BlockId), 0);
        }
        let blocks: Vec<BlockId> = (0..7).map(BlockId).collect();
        assert_eq!(lineage.depths(&blocks), [2, 3, 2, 1, 4, 1, 2]);
        assert_eq!(lineage.depths(&[BlockId(4), BlockId(2)]), [4, 2]);
        let counted = blocks.iter().map(|block| lineage.ancestors(*block).count() as u32 + 1);
        assert!(counted.eq(lineage.depths(&blocks)));
    }
}
