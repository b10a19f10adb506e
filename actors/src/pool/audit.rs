//! What must hold of a pool at all times, checked the slow way. For tests.

use super::{Pool, SizeClass};

impl Pool {
    /// The generation of a slot, by number.
    pub fn generation(&self, slot: usize) -> u32 {
        self.table.generation(slot)
    }

    /// Raw slots set aside.
    pub fn reserved_raw(&self) -> usize {
        self.reserved_raw
    }

    /// Slots taken and not given back, and not in quarantine either, by class.
    pub fn held(&self) -> [usize; SizeClass::COUNT] {
        let quarantined = |class| self.quarantine.iter().filter(|(c, _)| *c == class).count();
        SizeClass::ALL.map(|class| self.used(class) - quarantined(class))
    }

    /// Whether `slot` is vacant, or freed and still looked at.
    pub fn is_free(&self, slot: usize) -> bool {
        self.slots[slot].vacant.is_some()
            || self.quarantine.iter().any(|(_, held)| held.id().0 as usize == slot)
    }

    /// Recounts everything that the pool keeps count of.
    ///
    /// # Errors
    /// What does not add up.
    pub fn audit(&self) -> Result<(), String> {
        let per_chunk = self.layout.slot_ids_per_chunk();
        let (mut vacancies, mut taken) = ([0; SizeClass::COUNT], 0);
        for (index, chunk) in self.chunks.iter().enumerate() {
            let slots = chunk.class.map_or(0, |class| self.layout.slots_per_chunk(class));
            for bit in 0..per_chunk {
                let vacant = self.slots[index * per_chunk + bit].vacant.is_some();
                let listed = chunk.vacant >> bit & 1 == 1;
                if bit < slots && vacant != listed {
                    return Err(format!("chunk {index} slot {bit}: vacant is {vacant}, its bit {listed}"));
                }
                if bit >= slots && (listed || !vacant) {
                    return Err(format!("chunk {index} slot {bit} is past the {slots} slots of its class"));
                }
                taken += usize::from(!vacant);
            }
            match chunk.class {
                _ if chunk.draining => {}
                Some(class) => vacancies[class as usize] += chunk.vacant.count_ones() as usize,
                None => {}
            }
            let at_its_place = match (chunk.class, chunk.listed_at) {
                (Some(class), Some(at)) => {
                    self.with_vacancy[class as usize].get(at) == Some(&(index as u32)) && chunk.vacant != 0
                }
                (Some(_), None) => chunk.vacant == 0 || chunk.draining,
                (None, listed) => listed.is_none() && self.stock.contains(&(index as u32)),
            };
            if !at_its_place {
                return Err(format!("chunk {index} is not where it belongs: {chunk:?}"));
            }
        }
        let host_taken =
            self.slots[self.layout.slot_ids()..].iter().filter(|slot| slot.vacant.is_none()).count();
        let in_stock = self.chunks.iter().filter(|chunk| chunk.class.is_none()).count();
        let listed: usize = self.with_vacancy.iter().map(Vec::len).sum();
        let with_vacancy = self.chunks.iter().filter(|chunk| chunk.vacant != 0 && !chunk.draining).count();
        if vacancies != self.vacancies {
            return Err(format!("vacant slots by class: {vacancies:?} counted, {:?} kept", self.vacancies));
        }
        let [of_slab @ .., host_used] = self.used;
        for (what, counted, kept) in [
            ("chunks in stock", in_stock, self.stock.len()),
            ("chunks with vacancies", with_vacancy, listed),
            ("slots taken", taken, of_slab.iter().sum()),
            ("host slots taken", host_taken, host_used),
            ("host slots free", self.layout.host_slots - host_taken, self.host.free_units()),
        ] {
            if counted != kept {
                return Err(format!("{what}: {counted} counted, {kept} kept"));
            }
        }
        if self.reserved_raw > self.raw_vacant() {
            return Err(format!("{} raw slots reserved, {} vacant", self.reserved_raw, self.raw_vacant()));
        }
        Ok(())
    }
}
