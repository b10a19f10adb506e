//! An entropy coder for symbols in planes of rows: rANS ([Duda 2013](https://arxiv.org/abs/1311.2540)), eight states in turns over one
//! stream of 16-bit words ([Giesen 2014](https://arxiv.org/abs/1402.3392)).
//!
//! A row is a token's; above a symbol stand those of the same channel in the tokens before. Channels differ in spread and many keep their
//! sign and magnitude from token to token, so what stands above says much about a symbol, and the decoder knows it too: no table a channel
//! is needed, of which a block of 32 tokens would hold more than of symbols.

use super::ColdError;
use super::input::Input;
use super::tables::{CELLS, FIRST, SCALE, SCALE_BITS, Tables};

/// Coded in turns, so that one waits for memory while others are computed.
const STATES: usize = 8;
/// States stay at and above this, and begin there.
const LEAST: u32 = 1 << 16;
/// Bits of a symbol, at most.
const SYMBOL_BITS: u32 = 9;

/// Symbols of one kind, in order: neighbours in number are neighbours in value.
#[derive(Debug, Clone)]
pub(super) struct Alphabet {
    /// Of each symbol, where it stands as a context: below 64, so that two add up to less than [`FIRST`].
    levels: Vec<u8>,
}

impl Alphabet {
    /// `symbols` (at most 512), each a context of `level`.
    pub(super) fn new(symbols: u16, level: impl Fn(u16) -> u8) -> Self {
        debug_assert!(symbols <= 1 << SYMBOL_BITS);
        Alphabet { levels: (0..symbols).map(|symbol| level(symbol).min(63)).collect() }
    }

    fn level(&self, symbol: u16) -> u8 {
        self.levels.get(usize::from(symbol)).copied().unwrap_or_default()
    }

    /// Contexts of the row that begins at `first` in a plane of rows of `dim`.
    fn contexts(&self, plane: &[u16], first: usize, dim: usize, contexts: &mut [u8]) {
        if first == 0 {
            return contexts.fill(FIRST);
        }
        let above = &plane[first - dim..first];
        let two_above = if first >= 2 * dim { &plane[first - 2 * dim..first - dim] } else { above };
        for ((context, above), two_above) in contexts.iter_mut().zip(above).zip(two_above) {
            *context = self.level(*above) + self.level(*two_above);
        }
    }
}

/// Appends the symbols of planes of `plane` symbols each, in rows of `dim`.
pub(super) fn encode(alphabet: &Alphabet, plane: usize, dim: usize, symbols: &[u16], out: &mut Vec<u8>) {
    if symbols.is_empty() {
        return;
    }
    let count = alphabet.levels.len();
    let mut contexts = vec![0; symbols.len()];
    let mut counts = vec![0u32; CELLS * count];
    for (symbols, contexts) in symbols.chunks_exact(plane).zip(contexts.chunks_exact_mut(plane)) {
        for first in (0..plane).step_by(dim) {
            let contexts = &mut contexts[first..first + dim];
            alphabet.contexts(symbols, first, dim, contexts);
            for (symbol, context) in symbols[first..].iter().zip(contexts) {
                counts[usize::from(*context) * count + usize::from(*symbol)] += 1;
            }
        }
    }
    let tables = Tables::of(&counts);
    tables.write(count, out);

    let codes = codes(&tables, count);
    let mut states = [LEAST; STATES];
    let mut words = Vec::with_capacity(symbols.len() / 2);
    // From the last to the first: the decoder undoes it in order.
    for (symbols, contexts) in symbols.chunks_exact(dim).zip(contexts.chunks_exact(dim)).rev() {
        for (at, (symbol, context)) in symbols.iter().zip(contexts).enumerate().rev() {
            let class = usize::from(tables.class_of[usize::from(*context)]);
            let Code { frequency, start } = codes[class * count + usize::from(*symbol)];
            let state = &mut states[at % STATES];
            if u64::from(*state) >= u64::from(frequency) << (32 - SCALE_BITS) {
                words.push(*state as u16);
                *state >>= 16;
            }
            let (whole, part) = (*state / frequency, *state % frequency);
            *state = (whole << SCALE_BITS) + part + start;
        }
    }
    out.extend((words.len() as u32).to_le_bytes());
    out.extend(states.iter().flat_map(|state| state.to_le_bytes()));
    out.extend(words.iter().rev().flat_map(|word| word.to_le_bytes()));
}

#[derive(Debug, Clone, Copy, Default)]
struct Code {
    frequency: u32,
    start: u32,
}

/// `[classes, symbols]`
fn codes(tables: &Tables, symbols: usize) -> Vec<Code> {
    let mut codes = vec![Code::default(); tables.classes() * symbols];
    let of_classes = tables.frequencies.chunks_exact(tables.active.len());
    for (frequencies, codes) in of_classes.zip(codes.chunks_exact_mut(symbols)) {
        let mut start = 0;
        for (symbol, frequency) in tables.active.iter().zip(frequencies) {
            codes[usize::from(*symbol)] = Code { frequency: *frequency, start };
            start += frequency;
        }
    }
    codes
}

/// Gives back plane after plane what [`encode`] was given.
#[derive(Debug)]
pub(super) struct Decoder {
    alphabet: Alphabet,
    class_of: [u8; CELLS],
    /// `[classes, SCALE]` entries: frequency less 1, offset within the symbol's range, symbol.
    entries: Vec<u32>,
    states: [u32; STATES],
    words: Vec<u16>,
    /// Words that were read, or would have been.
    read: usize,
    /// Of one row: where its class begins in `entries`.
    bases: Vec<u32>,
    contexts: Vec<u8>,
}

impl Decoder {
    /// Reads tables and words. Allocates what they take in the input, and a bounded number of decoding tables.
    pub(super) fn new(alphabet: Alphabet, input: &mut Input<'_>) -> Result<Decoder, ColdError> {
        let tables = Tables::read(alphabet.levels.len(), input)?;
        let mut entries = Vec::with_capacity(tables.classes() * SCALE as usize);
        for frequencies in tables.frequencies.chunks_exact(tables.active.len()) {
            for (symbol, frequency) in tables.active.iter().zip(frequencies) {
                let entry = (frequency.wrapping_sub(1) << (SYMBOL_BITS + SCALE_BITS)) | u32::from(*symbol);
                entries.extend((0..*frequency).map(|offset| entry | offset << SYMBOL_BITS));
            }
        }
        let len = input.word()? as usize;
        let mut states = [0; STATES];
        for state in &mut states {
            *state = input.word()?;
            input.within("a state", *state as usize, LEAST as usize..=u32::MAX as usize)?;
        }
        let words = input.take(len.saturating_mul(2))?;
        let words = words.chunks_exact(2).map(|word| u16::from_le_bytes([word[0], word[1]])).collect();
        let (bases, contexts) = (Vec::new(), Vec::new());
        Ok(Decoder { alphabet, class_of: tables.class_of, entries, states, words, read: 0, bases, contexts })
    }

    /// The next plane, in rows of `dim`.
    pub(super) fn plane(&mut self, dim: usize, symbols: &mut [u16]) {
        self.bases.resize(dim, 0);
        self.contexts.resize(dim, 0);
        for first in (0..symbols.len()).step_by(dim) {
            self.alphabet.contexts(symbols, first, dim, &mut self.contexts);
            for (base, context) in self.bases.iter_mut().zip(&self.contexts) {
                let class = self.class_of[usize::from(*context) % CELLS];
                *base = u32::from(class) << SCALE_BITS;
            }
            self.row(&mut symbols[first..first + dim]);
        }
    }

    fn row(&mut self, row: &mut [u16]) {
        for (symbols, bases) in row.chunks_mut(STATES).zip(self.bases.chunks(STATES)) {
            // Behind the last word come zeros: `finish` tells that there were too few.
            let mut next = [0; STATES];
            match self.words.get(self.read..self.read + STATES) {
                Some(words) => next.copy_from_slice(words),
                None => {
                    let words = self.words.get(self.read..).unwrap_or_default();
                    next[..words.len()].copy_from_slice(words);
                }
            }
            let mut taken = 0;
            for ((symbol, base), state) in symbols.iter_mut().zip(bases).zip(&mut self.states) {
                let entry = self.entries[(base + *state % SCALE) as usize];
                let frequency = (entry >> (SYMBOL_BITS + SCALE_BITS)) + 1;
                *symbol = (entry & ((1 << SYMBOL_BITS) - 1)) as u16;
                let decoded = frequency * (*state >> SCALE_BITS) + (entry >> SYMBOL_BITS) % SCALE;
                let short = decoded < LEAST;
                let longer = decoded << 16 | u32::from(next[taken % STATES]);
                *state = if short { longer } else { decoded };
                taken += usize::from(short);
            }
            self.read += taken;
        }
    }

    /// All words are read, and the states are back where they began.
    pub(super) fn finish(self, input: &Input<'_>) -> Result<(), ColdError> {
        input.within("words", self.words.len(), self.read..=self.read)?;
        for state in self.states {
            input.within("a last state", state as usize, LEAST as usize..=LEAST as usize)?;
        }
        Ok(())
    }
}
