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
    symbols: usize,
    /// Of each symbol, where it stands as a context: below 64, so that two add up to less than [`FIRST`].
    levels: [u8; 1 << SYMBOL_BITS],
}

impl Alphabet {
    /// `symbols` (at most 512), each a context of `level`.
    pub(super) fn new(symbols: u16, level: impl Fn(u16) -> u8) -> Self {
        let mut levels = [0; 1 << SYMBOL_BITS];
        for (symbol, to) in (0..symbols).zip(&mut levels) {
            *to = level(symbol).min(63);
        }
        Alphabet { symbols: usize::from(symbols), levels }
    }
}

/// What the rows above say about the next one of a plane.
#[derive(Debug)]
struct Above {
    rows: usize,
    /// Levels of the last row and of the one before.
    last: Vec<u8>,
    before: Vec<u8>,
}

impl Above {
    fn new(dim: usize) -> Self {
        Above { rows: 0, last: vec![0; dim], before: vec![0; dim] }
    }

    /// A new plane begins.
    fn clear(&mut self) {
        self.rows = 0;
    }

    /// Contexts of the next row. A plane's second row has one above, which counts twice.
    fn contexts(&self) -> impl Iterator<Item = u8> {
        let (first, before) = (self.rows == 0, if self.rows < 2 { &self.last } else { &self.before });
        self.last.iter().zip(before).map(move |(last, before)| if first { FIRST } else { last + before })
    }

    fn push(&mut self, alphabet: &Alphabet, row: &[u16]) {
        std::mem::swap(&mut self.last, &mut self.before);
        for (level, symbol) in self.last.iter_mut().zip(row) {
            *level = alphabet.levels[usize::from(*symbol) % alphabet.levels.len()];
        }
        self.rows += 1;
    }
}

/// Appends the symbols of planes of `plane` symbols each, in rows of `dim`.
pub(super) fn encode(alphabet: &Alphabet, plane: usize, dim: usize, symbols: &[u16], out: &mut Vec<u8>) {
    if symbols.is_empty() {
        return;
    }
    let count = alphabet.symbols;
    let mut contexts = Vec::with_capacity(symbols.len());
    let mut counts = vec![0u32; CELLS * count];
    let mut above = Above::new(dim);
    for plane in symbols.chunks_exact(plane) {
        above.clear();
        for row in plane.chunks_exact(dim) {
            contexts.extend(above.contexts());
            above.push(alphabet, row);
        }
    }
    for (symbol, context) in symbols.iter().zip(&contexts) {
        counts[usize::from(*context) * count + usize::from(*symbol)] += 1;
    }
    let tables = Tables::of(&counts);
    tables.write(count, out);

    let codes = codes(&tables, count);
    let bases = tables.class_of.map(|class| usize::from(class) * count);
    let mut states = [LEAST; STATES];
    // Filled from its end: from the last symbol to the first, which the decoder undoes in order. One word a symbol at most.
    let mut words = vec![0u16; symbols.len() + 1];
    let mut begin = words.len() - 1;
    for (symbols, contexts) in symbols.chunks_exact(dim).zip(contexts.chunks_exact(dim)).rev() {
        for (at, (symbol, context)) in symbols.iter().zip(contexts).enumerate().rev() {
            let Code { frequency, start } =
                codes[bases[usize::from(*context) % CELLS] + usize::from(*symbol)];
            let state = states[at % STATES];
            // Without a branch: nobody can foretell it. What is written and not kept is written over.
            words[begin] = state as u16;
            let full = u64::from(state) >= u64::from(frequency) << (32 - SCALE_BITS);
            begin -= usize::from(full);
            let state = if full { state >> 16 } else { state };
            let (whole, part) = (state / frequency, state % frequency);
            states[at % STATES] = (whole << SCALE_BITS) + part + start;
        }
    }
    let words = &words[begin + 1..];
    out.extend((words.len() as u32).to_le_bytes());
    out.extend(states.iter().flat_map(|state| state.to_le_bytes()));
    out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
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
    /// Of each cell, where its class begins in `entries`.
    base_of: [u32; CELLS],
    /// `[classes, SCALE]` entries: frequency less 1, offset within the symbol's range, symbol.
    entries: Vec<u32>,
    states: [u32; STATES],
    words: Vec<u16>,
    /// Words that were read, or would have been.
    read: usize,
    above: Above,
    /// Of one row: where its class begins in `entries`.
    bases: Vec<u32>,
}

impl Decoder {
    /// Reads tables and words of rows of `dim`. Allocates what they take in the input, and a bounded number of decoding tables.
    pub(super) fn new(alphabet: Alphabet, dim: usize, input: &mut Input<'_>) -> Result<Decoder, ColdError> {
        let tables = Tables::read(alphabet.symbols, input)?;
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
        let base_of = tables.class_of.map(|class| u32::from(class) << SCALE_BITS);
        let (above, bases) = (Above::new(dim), vec![0; dim]);
        Ok(Decoder { alphabet, base_of, entries, states, words, read: 0, above, bases })
    }

    /// The next plane.
    pub(super) fn plane(&mut self, symbols: &mut [u16]) {
        self.above.clear();
        for row in symbols.chunks_exact_mut(self.bases.len()) {
            for (base, context) in self.bases.iter_mut().zip(self.above.contexts()) {
                *base = self.base_of[usize::from(context) % CELLS];
            }
            self.row(row);
            self.above.push(&self.alphabet, row);
        }
    }

    fn row(&mut self, row: &mut [u16]) {
        let (symbols, last_symbols) = row.as_chunks_mut::<STATES>();
        let (bases, last_bases) = self.bases.as_chunks::<STATES>();
        let mut states = self.states;
        for (symbols, bases) in symbols.iter_mut().zip(bases) {
            self.read += turn(&self.entries, &mut states, &self.words, self.read, symbols, bases);
        }
        self.read += turn(&self.entries, &mut states, &self.words, self.read, last_symbols, last_bases);
        self.states = states;
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

/// A symbol of each state, as far as there are any; how many words that took.
#[inline(always)]
fn turn(
    entries: &[u32],
    states: &mut [u32; STATES],
    words: &[u16],
    read: usize,
    symbols: &mut [u16],
    bases: &[u32],
) -> usize {
    // Behind the last word come zeros: `finish` tells that there were too few.
    let mut next = [0; STATES];
    match words.get(read..read + STATES) {
        Some(words) => next.copy_from_slice(words),
        None => {
            let words = words.get(read..).unwrap_or_default();
            next[..words.len()].copy_from_slice(words);
        }
    }
    let mut taken = 0;
    for ((symbol, base), state) in symbols.iter_mut().zip(bases).zip(states) {
        let entry = entries[(base + *state % SCALE) as usize];
        let frequency = (entry >> (SYMBOL_BITS + SCALE_BITS)) + 1;
        *symbol = (entry & ((1 << SYMBOL_BITS) - 1)) as u16;
        let decoded = frequency * (*state >> SCALE_BITS) + (entry >> SYMBOL_BITS) % SCALE;
        let short = decoded < LEAST;
        let longer = decoded << 16 | u32::from(next[taken % STATES]);
        *state = if short { longer } else { decoded };
        taken += usize::from(short);
    }
    taken
}
