//! How likely each symbol is in each context: counted, merged, made to add up, and written before what is coded with it.
//!
//! A context is one of [`CELLS`] cells, made of what stands before a symbol. Neighbouring cells hold much alike, and each table costs bytes: they
//! are merged into classes while that makes the whole smaller.

use super::ColdError;
use super::input::Input;

/// Contexts that are told apart.
pub(super) const CELLS: usize = 128;
/// The context of symbols with nothing before them.
pub(super) const FIRST: u8 = 127;
/// Frequencies of a class add up to `1 << SCALE_BITS`.
pub(super) const SCALE_BITS: u32 = 11;
pub(super) const SCALE: u32 = 1 << SCALE_BITS;
/// Decoding tables of so many classes (8 KiB each) stay in a core's second cache.
const CLASSES_MAX: usize = 40;
/// Frequencies from here on take two bytes.
const LONG: u32 = 192;
/// What an entry of a table takes, about.
const ENTRY_BITS: u64 = 9;

/// Frequencies of symbols in classes of contexts.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tables {
    /// The class of each cell.
    pub(super) class_of: [u8; CELLS],
    /// Symbols that occur, ascending.
    pub(super) active: Vec<u16>,
    /// `[classes, active]`, each class adding up to [`SCALE`].
    pub(super) frequencies: Vec<u32>,
}

impl Tables {
    /// Of `counts`, `[CELLS, symbols]`; at least one is not zero.
    pub(super) fn of(counts: &[u32]) -> Tables {
        let symbols = counts.len() / CELLS;
        let mut all = vec![0u32; symbols];
        for cell in counts.chunks_exact(symbols) {
            all.iter_mut().zip(cell).for_each(|(all, count)| *all |= count);
        }
        let active = (0..symbols).filter(|symbol| all[*symbol] > 0).collect::<Vec<_>>();
        let classes =
            merged(counts.chunks_exact(symbols).map(|cell| active.iter().map(|symbol| cell[*symbol])));
        let mut class_of = [0; CELLS];
        let mut frequencies = Vec::with_capacity(classes.len() * active.len());
        for (class, Class { first, counts, .. }) in classes.iter().enumerate() {
            class_of[*first..].fill(class as u8);
            scale(counts, &mut frequencies);
        }
        let active = active.into_iter().map(|symbol| symbol as u16).collect();
        Tables { class_of, active, frequencies }
    }

    pub(super) fn classes(&self) -> usize {
        self.frequencies.len() / self.active.len()
    }

    pub(super) fn write(&self, symbols: usize, out: &mut Vec<u8>) {
        out.push(self.classes() as u8);
        for class in 1..self.classes() {
            let first = self.class_of.iter().position(|of| usize::from(*of) == class);
            out.push(first.unwrap_or_default() as u8);
        }
        let bits = out.len();
        out.resize(bits + symbols.div_ceil(8), 0);
        for symbol in &self.active {
            out[bits + usize::from(symbol / 8)] |= 1 << (symbol % 8);
        }
        for table in self.frequencies.chunks_exact(self.active.len()) {
            let mut rest = table;
            while let [frequency, behind @ ..] = rest {
                let zeros = behind.iter().take_while(|next| **next == 0).count().min(255);
                rest = match *frequency {
                    0 => {
                        out.extend([0, zeros as u8]);
                        &behind[zeros..]
                    }
                    short @ 1..LONG => {
                        out.push(short as u8);
                        behind
                    }
                    long => {
                        out.extend([(LONG + ((long - LONG) >> 8)) as u8, (long - LONG) as u8]);
                        behind
                    }
                };
            }
        }
    }

    pub(super) fn read(symbols: usize, input: &mut Input<'_>) -> Result<Tables, ColdError> {
        let classes = usize::from(input.byte()?);
        input.within("classes", classes, 1..=CLASSES_MAX)?;
        let mut class_of = [0; CELLS];
        let mut before = 0;
        for class in 1..classes {
            let first = usize::from(input.byte()?);
            input.within("the first context of a class", first, before + 1..=CELLS - 1)?;
            class_of[first..].fill(class as u8);
            before = first;
        }
        let bits = input.take(symbols.div_ceil(8))?;
        let occurs = |symbol: &u16| bits[usize::from(symbol / 8)] >> (symbol % 8) & 1 == 1;
        let active = (0..symbols as u16).filter(occurs).collect::<Vec<_>>();
        input.within("symbols", active.len(), 1..=symbols)?;
        let mut frequencies = Vec::with_capacity(classes * active.len());
        for class in 1..=classes {
            let end = class * active.len();
            let mut sum = 0;
            while frequencies.len() < end {
                let frequency = match u32::from(input.byte()?) {
                    0 => {
                        let zeros = usize::from(input.byte()?) + 1;
                        input.within("frequencies of zero", zeros, 1..=end - frequencies.len())?;
                        frequencies.resize(frequencies.len() + zeros, 0);
                        continue;
                    }
                    short @ 1..LONG => short,
                    long => LONG + ((long - LONG) << 8) + u32::from(input.byte()?),
                };
                frequencies.push(frequency);
                sum += frequency as usize;
            }
            input.within("the sum of frequencies", sum, SCALE as usize..=SCALE as usize)?;
        }
        Ok(Tables { class_of, active, frequencies })
    }
}

struct Class {
    /// Its first cell.
    first: usize,
    counts: Vec<u32>,
    bits: u64,
}

/// Cells that occur, the cheapest neighbours merged until nothing is gained.
fn merged(cells: impl Iterator<Item = impl Iterator<Item = u32>>) -> Vec<Class> {
    let mut classes = Vec::with_capacity(CELLS);
    for (first, counts) in cells.enumerate() {
        let counts = counts.collect::<Vec<_>>();
        if counts.iter().any(|count| *count > 0) {
            let bits = bits(counts.iter().copied());
            classes.push(Class { first, counts, bits });
        }
    }
    // Cells that do not occur belong to the class before them, and the first begins at 0.
    if let Some(class) = classes.first_mut() {
        class.first = 0;
    }
    let together = |a: &Class, b: &Class| bits(a.counts.iter().zip(&b.counts).map(|(a, b)| a + b));
    let mut pairs = classes.windows(2).map(|pair| together(&pair[0], &pair[1])).collect::<Vec<_>>();
    loop {
        let loss = |at: usize| pairs[at] as i64 - (classes[at].bits + classes[at + 1].bits) as i64;
        let Some(at) = (0..pairs.len()).min_by_key(|at| loss(*at)) else { break };
        if loss(at) > 0 && classes.len() <= CLASSES_MAX {
            break;
        }
        let gone = classes.remove(at + 1);
        let class = &mut classes[at];
        class.counts.iter_mut().zip(gone.counts).for_each(|(count, more)| *count += more);
        class.bits = pairs.remove(at);
        if at > 0 {
            pairs[at - 1] = together(&classes[at - 1], &classes[at]);
        }
        if at < pairs.len() {
            pairs[at] = together(&classes[at], &classes[at + 1]);
        }
    }
    classes
}

/// What a class takes: its table and its symbols.
fn bits(counts: impl Iterator<Item = u32>) -> u64 {
    let (mut sum, mut entries, mut likely) = (0, 0, 0);
    for count in counts.filter(|count| *count > 0) {
        sum += u64::from(count);
        entries += 1;
        likely += u64::from(count) * log2(count);
    }
    entries * ENTRY_BITS + 8 + ((sum * log2(sum as u32) - likely) >> 16)
}

/// In 65,536ths. In integers: what is written must not depend on a machine's logarithm.
fn log2(x: u32) -> u64 {
    /// Of `1 + at / 256`.
    const TABLE: [u32; 257] = {
        let mut table = [0; 257];
        let mut at = 1;
        while at < 256 {
            // A bit of the logarithm for each squaring.
            let (mut x, mut bit) = ((256 + at as u64) << 23, 15);
            loop {
                x = (x * x) >> 31;
                if x >> 32 == 1 {
                    table[at] |= 1 << bit;
                    x >>= 1;
                }
                if bit == 0 {
                    break;
                }
                bit -= 1;
            }
            at += 1;
        }
        table[256] = 1 << 16;
        table
    };
    let whole = x.ilog2();
    let part = u64::from(x) << 32 >> whole & 0xFFFF_FFFF;
    let (at, between) = ((part >> 24) as usize, part & 0xFF_FFFF);
    let (low, high) = (u64::from(TABLE[at]), u64::from(TABLE[at + 1]));
    (u64::from(whole) << 16) + low + (((high - low) * between) >> 24)
}

/// Appends frequencies that add up to [`SCALE`] and are not zero where a count is not.
fn scale(counts: &[u32], frequencies: &mut Vec<u32>) {
    let sum = counts.iter().map(|count| u64::from(*count)).sum::<u64>();
    let first = frequencies.len();
    frequencies.extend(counts.iter().map(|count| match count {
        0 => 0,
        count => ((u64::from(*count) * u64::from(SCALE) + sum / 2) / sum).max(1) as u32,
    }));
    let frequencies = &mut frequencies[first..];
    let mut given = frequencies.iter().sum::<u32>();
    // The largest bear the difference: it changes them least. There are at most as many as frequencies, whose mean is 4 or more.
    while given != SCALE {
        let Some(largest) = frequencies.iter_mut().max() else { return };
        let change = (given.abs_diff(SCALE)).min((*largest / 8).max(1));
        if given > SCALE {
            *largest -= change;
            given -= change;
        } else {
            *largest += change;
            given += change;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_right() {
        for x in [1u32, 2, 3, 7, 100, 257, 65_535, 1 << 20, 123_456_789, u32::MAX] {
            let expected = f64::from(x).log2() * 65536.0;
            assert!((log2(x) as f64 - expected).abs() < 3.0, "{x}: {} {expected}", log2(x));
        }
    }

    #[test]
    fn frequencies_add_up_and_leave_nothing_out() {
        let many = (0..512).map(|at| if at == 7 { 1 << 30 } else { 1 }).collect::<Vec<_>>();
        for counts in [vec![5], vec![0, 1, 0], vec![1, 1, 1], vec![1000, 1, 0, 1], vec![3; 512], many] {
            let mut frequencies = Vec::new();
            scale(&counts, &mut frequencies);
            assert_eq!(frequencies.iter().sum::<u32>(), SCALE);
            for (frequency, count) in frequencies.iter().zip(&counts) {
                assert_eq!(*frequency > 0, *count > 0, "{counts:?}");
            }
        }
    }

    #[test]
    fn contexts_that_differ_stay_apart_and_those_alike_share_a_table() {
        let mut counts = vec![0; CELLS * 16];
        for cell in 10..40 {
            counts[cell * 16 + if cell < 20 { 3 } else { 9 }] = 500;
            counts[cell * 16 + 12] = 500;
        }
        let tables = Tables::of(&counts);
        assert_eq!(tables.active, [3, 9, 12]);
        assert_eq!(tables.frequencies, [1024, 0, 1024, 0, 1024, 1024]);
        assert_eq!((tables.class_of[19], tables.class_of[20]), (0, 1));
        let mut bytes = Vec::new();
        tables.write(16, &mut bytes);
        assert_eq!(Tables::read(16, &mut Input::new(&bytes)).unwrap(), tables);
    }
}
