//! Token dropping: which tokens of a sequence stay, and where what stays once stood. Plain functions, in f32.
//!
//! Truncation keeps the first tokens and the most recent ones, and moves no bytes. By *scores* any tokens stay: those that a key score or
//! the caller ranks highest, and always the sinks and some recent ones. They are copied together into blocks of their own, for all layers and
//! heads alike; their keys stay rotated to the positions where they stood, which is what [`Compacted`] knows.

use std::sync::Arc;

use crate::sequence::SINK_TOKENS;

/// Most recent tokens that dropping by scores always keeps, at most half of those that it may choose.
pub const RECENT_TOKENS: u32 = 32;

/// Tokens on either side that a key score is shared with.
pub const NEIGHBOURS: usize = 8;

/// A score of tokens by their keys alone: attention-free, so that any model's cache can be thinned out.
///
/// A token has one score: the mean over all layers and KV heads, which are brought to one scale first, and of that the highest of
/// [`NEIGHBOURS`] tokens on either side. What is worth remembering are phrases, not tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyScore {
    /// Keys with small norms score high: they are attended to most (Devoto et al. 2024, arXiv 2406.11430). Norms count in
    /// proportion to the mean norm of their head.
    Norm,
    /// Keys score high that are unlike the others: those with the least cosine similarity to the mean direction of their head's keys
    /// (KeyDiff: Park et al. 2025, arXiv 2504.15364).
    Diff,
}

impl KeyScore {
    /// Short stable name, as in configuration files and reports.
    pub const fn name(self) -> &'static str {
        match self {
            KeyScore::Norm => "key_norm",
            KeyScore::Diff => "key_diff",
        }
    }

    /// The highest score of each token and its neighbours, for [`choose`].
    pub fn shared(scores: &[f32]) -> Vec<f32> {
        let around = |at: usize| at.saturating_sub(NEIGHBOURS)..(at + NEIGHBOURS + 1).min(scores.len());
        let highest = |at: usize| scores[around(at)].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        (0..scores.len()).map(highest).collect()
    }

    /// Adds what the keys of one head say, `[tokens, dim]`, to the scores of the tokens.
    pub fn add(self, keys: &[f32], dim: usize, scores: &mut [f32]) {
        // In f64, since squares of elements as large as bf16 knows do not fit f32.
        let square = |key: &[f32]| key.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
        let norms: Vec<f64> = keys.chunks_exact(dim).map(|key| square(key).sqrt()).collect();
        match self {
            KeyScore::Norm => {
                let mean = norms.iter().sum::<f64>() / norms.len().max(1) as f64;
                if mean > 0.0 {
                    scores.iter_mut().zip(norms).for_each(|(score, norm)| *score -= (norm / mean) as f32);
                }
            }
            KeyScore::Diff => {
                let mut direction = vec![0.0f64; dim];
                for (key, norm) in keys.chunks_exact(dim).zip(&norms).filter(|(_, norm)| **norm > 0.0) {
                    direction.iter_mut().zip(key).for_each(|(sum, x)| *sum += f64::from(*x) / norm);
                }
                let length = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
                for ((score, key), norm) in scores.iter_mut().zip(keys.chunks_exact(dim)).zip(norms) {
                    let dot = key.iter().zip(&direction).map(|(x, y)| f64::from(*x) * y).sum::<f64>();
                    if norm * length > 0.0 {
                        *score -= (dot / norm / length) as f32;
                    }
                }
            }
        }
    }
}

/// Where the scores of a sequence's tokens come from.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenScores {
    /// Computed from the keys that are stored.
    Keys(KeyScore),
    /// One for each token that is there, in order of their positions, and whatever the caller makes of it: the attention that tokens got,
    /// say. Infinities are taken as they are.
    Given(Vec<f32>),
}

impl TokenScores {
    /// Bytes that they take on their way to the device.
    pub fn bytes(&self) -> u64 {
        match self {
            TokenScores::Keys(_) => 0,
            TokenScores::Given(scores) => size_of_val(&scores[..]) as u64,
        }
    }
}

impl From<KeyScore> for TokenScores {
    fn from(score: KeyScore) -> Self {
        TokenScores::Keys(score)
    }
}

impl From<Vec<f32>> for TokenScores {
    fn from(scores: Vec<f32>) -> Self {
        TokenScores::Given(scores)
    }
}

/// How a cache drops tokens by itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropping {
    /// By these scores; none: by truncation.
    pub score: Option<KeyScore>,
    /// Share of a sequence's tokens that is kept.
    pub ratio: f32,
}

impl Dropping {
    /// The ratio of truncation, if that is how.
    pub fn truncation(&self) -> Option<f32> {
        self.score.is_none().then_some(self.ratio)
    }

    /// The score, and how many tokens shall stay of a sequence's `committed`, if it is time to drop some. `stored` of them are there, `thinned` of
    /// which have outlived a dropping before.
    ///
    /// What goes is a whole number of blocks, so that those behind begin where blocks do. Each time all that stays is copied. So a block of room
    /// must be gained, and a quarter as many tokens be new as were kept: then no token of a growing sequence costs more than a few copies, and it
    /// is over its ratio by no more than that quarter and a block.
    pub fn due(
        &self,
        committed: u32,
        stored: u32,
        thinned: u32,
        block_tokens: u32,
    ) -> Option<(KeyScore, u32)> {
        let keep = (f64::from(committed) * f64::from(self.ratio)).ceil() as u32;
        let keep = keep.max(SINK_TOKENS + 1);
        let keep = committed - committed.saturating_sub(keep) / block_tokens * block_tokens;
        let is_due = stored.saturating_sub(keep) >= block_tokens && stored - thinned >= thinned / 4;
        self.score.filter(|_| is_due).map(|score| (score, keep))
    }

    /// Its name in block keys.
    pub(crate) fn name(&self) -> String {
        format!("{}:{}", self.score.map_or("truncation", KeyScore::name), self.ratio)
    }
}

/// The tokens that stay of as many as there are scores, in ascending order: the sinks, the most recent ones, and of the others those with
/// the highest scores; of equal ones the earlier. `keep` counts them all, and is at least one more than the sinks.
pub fn choose(scores: &[f32], keep: u32) -> Vec<u32> {
    let all = scores.len() as u32;
    let keep = keep.max(SINK_TOKENS + 1);
    if keep >= all {
        return (0..all).collect();
    }
    let recent = RECENT_TOKENS.min((keep - SINK_TOKENS).div_ceil(2));
    let mut others: Vec<u32> = (SINK_TOKENS..all - recent).collect();
    let chosen = (keep - SINK_TOKENS - recent) as usize;
    let score = |token: &u32| scores[*token as usize];
    if chosen > 0 {
        others.select_nth_unstable_by(chosen - 1, |a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
    }
    others.truncate(chosen);
    others.sort_unstable();
    (0..SINK_TOKENS).chain(others).chain(all - recent..all).collect()
}

/// Where the tokens of a block stand in their sequence: part of what sealed keys mean that are differences from a centre.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Positions {
    /// One after the other from this one on: a multiple of the tokens of a block, where a block begins of any sequence that nothing was dropped from.
    Contiguous(u32),
    /// Each for itself: as many as a block has tokens. Others between them were dropped by their scores, or before them so many that they are no whole
    /// blocks.
    PerToken(Arc<[u32]>),
}

impl Positions {
    /// Of the stored tokens in the block at place `at` of a sequence, which may have been `compacted`; of the next ones as well if it is not full.
    pub fn of_block(compacted: Option<&Compacted>, at: usize, block_tokens: usize) -> Positions {
        let stored = (at * block_tokens) as u32..((at + 1) * block_tokens) as u32;
        let Some(compacted) = compacted else { return Positions::Contiguous(stored.start) };
        let (first, last) = (compacted.position(stored.start), compacted.position(stored.end - 1));
        if last - first == stored.end - 1 - stored.start && first.is_multiple_of(block_tokens as u32) {
            return Positions::Contiguous(first);
        }
        Positions::PerToken(stored.map(|stored| compacted.position(stored)).collect())
    }

    /// Where a token of the block stands.
    pub fn of(&self, token: usize) -> u32 {
        match self {
            Positions::Contiguous(first) => first + token as u32,
            Positions::PerToken(each) => each[token],
        }
    }
}

/// Where the tokens stood that were kept when others were dropped.
///
/// A sequence's blocks hold its *stored* tokens one after the other. Those that outlived a dropping come first; all behind them stand at
/// positions that follow each other. Forks share it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compacted {
    /// Positions of the first stored tokens, ascending.
    positions: Arc<[u32]>,
    /// Position of the stored token behind those.
    next: u32,
}

impl Compacted {
    /// Tokens at these positions were kept of the first `next`.
    pub(crate) fn new(positions: Vec<u32>, next: u32) -> Self {
        debug_assert!(positions.is_sorted() && positions.last().is_none_or(|last| *last < next));
        Compacted { positions: positions.into(), next }
    }

    /// Tokens that have outlived a dropping.
    pub(crate) fn thinned(&self) -> u32 {
        self.positions.len() as u32
    }

    /// Tokens that are stored of the first `position`.
    pub(crate) fn stored(&self, position: u32) -> u32 {
        match position.checked_sub(self.next) {
            Some(behind) => self.thinned() + behind,
            None => self.positions.partition_point(|kept| *kept < position) as u32,
        }
    }

    /// The position of a stored token.
    pub fn position(&self, stored: u32) -> u32 {
        let kept = self.positions.get(stored as usize).copied();
        kept.unwrap_or_else(|| self.next + (stored - self.thinned()))
    }

    /// What is left of it if the sequence is cut to its first `tokens`.
    pub(crate) fn truncated(&self, tokens: u32) -> Self {
        if tokens >= self.next {
            return self.clone();
        }
        Compacted { positions: self.positions[..self.stored(tokens) as usize].into(), next: tokens }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn sinks_and_recent_tokens_stay_whatever_their_scores() {
        let mut scores = vec![0.0; 200];
        scores[..4].fill(f32::NEG_INFINITY);
        scores[190..].fill(-9.0);
        (scores[70], scores[90], scores[100]) = (2.0, f32::INFINITY, 1.0);
        // Of few, half are recent ones.
        assert_eq!(choose(&scores, 10), [0, 1, 2, 3, 70, 90, 100, 197, 198, 199]);
        let kept = choose(&scores, 100);
        assert_eq!(kept.len(), 100);
        assert!([70, 90].iter().all(|token| kept.contains(token)) && kept[68..].iter().copied().eq(168..200));
        // Of equal ones the earlier stay.
        assert_eq!(choose(&[0.0; 12], 8), [0, 1, 2, 3, 4, 5, 10, 11]);
        assert_eq!(choose(&[0.0; 12], 0), [0, 1, 2, 3, 11], "never fewer");
        assert_eq!(choose(&[0.0; 12], 12), (0..12).collect::<Vec<_>>());
        assert_eq!(choose(&[0.0; 3], 1), [0, 1, 2]);
        assert!(choose(&[], 1).is_empty());
    }

    #[test]
    fn key_scores_are_those_of_their_papers() {
        // Norms 5, 1, 0, 2: 2 on average.
        let keys = [3.0, 4.0, 0.0, -1.0, 0.0, 0.0, 2.0, 0.0];
        let mut scores = [1.0; 4];
        KeyScore::Norm.add(&keys, 2, &mut scores);
        assert_eq!(scores, [-1.5, 0.5, 1.0, 0.0]);
        // Directions (.6, .8), (0, -1), none, (1, 0): their sum is (1.6, -.2).
        let mut scores = [0.0; 4];
        KeyScore::Diff.add(&keys, 2, &mut scores);
        let length = 2.6f32.sqrt();
        let expected = [-(0.96 - 0.16) / length, -0.2 / length, 0.0, -1.6 / length];
        assert!(scores.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{scores:?} {expected:?}");
        // As large as elements go: no infinity on the way.
        for score in [KeyScore::Norm, KeyScore::Diff] {
            let mut scores = [0.0; 2];
            score.add(&[f32::MAX, f32::MAX, -f32::MAX, f32::MAX], 2, &mut scores);
            assert!(scores.iter().all(|score| score.is_finite()), "{score:?}: {scores:?}");
        }
    }

    #[test]
    fn key_scores_are_shared_with_neighbours() {
        let mut scores = vec![-1.0; 40];
        (scores[10], scores[14], scores[39]) = (2.0, 3.0, 1.0);
        let shared = KeyScore::shared(&scores);
        let expected = |at: usize| match at {
            6..=22 => 3.0,
            2..=5 => 2.0,
            31..=39 => 1.0,
            _ => -1.0,
        };
        assert!((0..40).all(|at| shared[at] == expected(at)), "{shared:?}");
        assert!(KeyScore::shared(&[]).is_empty());
    }

    #[test]
    fn stored_tokens_and_positions() {
        let compacted = Compacted::new(vec![0, 1, 5, 9], 10);
        let stored: Vec<u32> = [0, 1, 2, 5, 6, 9, 10, 12].map(|p| compacted.stored(p)).into();
        assert_eq!(stored, [0, 1, 2, 2, 3, 3, 4, 6]);
        assert_eq!((0..6).map(|at| compacted.position(at)).collect::<Vec<_>>(), [0, 1, 5, 9, 10, 11]);
        for cut in [10, 11, 99] {
            assert_eq!(compacted.truncated(cut), compacted);
        }
        let cut = compacted.truncated(7);
        assert_eq!((cut.thinned(), cut.stored(7), cut.position(3)), (3, 3, 7));
        assert_eq!((cut.position(2), cut.stored(9)), (5, 5), "and it goes on behind the cut");
        assert_eq!(compacted.truncated(0).position(0), 0);
        // In blocks of three.
        assert_eq!(Positions::of_block(Some(&compacted), 0, 3), Positions::PerToken([0, 1, 5].into()));
        assert_eq!(Positions::of_block(Some(&compacted), 1, 3), Positions::Contiguous(9));
        assert_eq!(Positions::of_block(Some(&compacted), 2, 3), Positions::Contiguous(12));
        assert_eq!(Positions::of_block(Some(&compacted), 0, 4), Positions::PerToken([0, 1, 5, 9].into()));
        assert_eq!(
            Positions::of_block(Some(&compacted), 1, 4),
            Positions::PerToken([10, 11, 12, 13].into()),
            "no block begins there"
        );
        assert_eq!(
            (0..3).map(|at| Positions::of_block(Some(&cut), 1, 3).of(at)).collect::<Vec<_>>(),
            [7, 8, 9]
        );
        assert_eq!(Positions::Contiguous(6).of(2), 8);
    }

    /// However a sequence grows, it is never far above its ratio, and copies cost a few times its tokens.
    #[test]
    fn dropping_is_due_often_enough_and_no_more() {
        for (ratio, step) in [(0.5, 1), (0.5, 32), (0.9, 7), (0.1, 500), (1.0, 40)] {
            let dropping = Dropping { score: Some(KeyScore::Diff), ratio };
            let (mut stored, mut thinned, mut copied) = (0u32, 0u32, 0u32);
            for committed in (step..20_000).step_by(step as usize) {
                stored += step;
                if let Some((_, keep)) = dropping.due(committed, stored, thinned, 32) {
                    let least = ((f64::from(committed) * f64::from(ratio)).ceil() as u32).max(5);
                    assert!((least..least + 32).contains(&keep) && (committed - keep).is_multiple_of(32));
                    (stored, thinned, copied) = (keep, keep, copied + keep);
                }
                let most = 1.3 * committed as f32 * ratio + (32.0 + step as f32) / (1.01 - ratio);
                assert!(stored as f32 <= most.max(64.0), "{ratio} {step}: {stored} of {committed}");
            }
            assert!(copied <= 20_000 * 5, "{ratio} {step}: {copied}");
        }
        let truncation = Dropping { score: None, ratio: 0.5 };
        assert_eq!(truncation.due(1000, 1000, 0, 32), None);
        // A prompt that comes at once is at its ratio when it is in.
        let dropping = Dropping { score: Some(KeyScore::Norm), ratio: 0.5 };
        assert_eq!(dropping.due(1000, 1000, 0, 32), Some((KeyScore::Norm, 1000 - 15 * 32)));
        assert_eq!(dropping.due(60, 60, 0, 32), None, "not for less than a block");
    }
}
