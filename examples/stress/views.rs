//! Views: a layer borrowed in place while its sequence goes on changing.
//!
//! What a view shows is fixed when it is taken: the worker takes one, lets something happen to the sequence, and only then
//! compares. Seals, copies on write and reused slots that ignore a pin show up here.

use half::f16;
use kv_cache::{Rows, Scales, View};
use rand::Rng;

use crate::recorder::Kind;
use crate::worker::{Fault, Held, Worker};

impl Worker {
    /// Takes a view of a layer, changes the sequence, and checks that the view shows what was there before.
    pub(crate) async fn view(&mut self, held: &mut Held) -> Result<(), Fault> {
        let layer = self.rng.random_range(0..self.load.shape.layers);
        let view = held.sequence.view(layer).map_err(|error| Fault::of(Kind::Read, error))?;
        let then = held.model.clone();
        match self.rng.random_range(0..4) {
            0 => self.append(held).await?,
            1 => self.append_staged(held).await?,
            2 => self.truncate(held).await?,
            _ => {
                // Truncated and written again: the new bytes must not go where the view looks.
                self.truncate(held).await?;
                self.append(held).await?;
            }
        }
        let shown = decoded(&view, self.load.shape.kv_heads as usize, self.load.shape.head_dim as usize)
            .map_err(|error| Fault::of(Kind::Read, error))?;
        self.check("a view", &then, layer, 0, &then.seeds(0..then.len()), &shown)
    }
}

/// The keys and values of a view as `[tokens, kv_heads, head_dim]`.
fn decoded(view: &View, heads: usize, dim: usize) -> Result<(Vec<f16>, Vec<f16>), kv_cache::Error> {
    let elements = view.tokens() as usize * heads * dim;
    let (mut keys, mut values) = (vec![f16::ZERO; elements], vec![f16::ZERO; elements]);
    for block in view.blocks() {
        for head in 0..heads {
            let first = block.first_token() as usize * heads + head;
            scatter(&block.keys(head)?, first, heads, dim, &mut keys);
            scatter(&block.values(head)?, first, heads, dim, &mut values);
        }
    }
    Ok((keys, values))
}

/// Puts the rows of one head, from row `first` on, where they belong among those of all `heads`.
fn scatter(rows: &Rows<'_, f16>, first: usize, heads: usize, dim: usize, out: &mut [f16]) {
    let places = out.chunks_exact_mut(dim).skip(first).step_by(heads);
    match rows {
        Rows::Raw(elements) => {
            places.zip(elements.chunks_exact(dim)).for_each(|(place, row)| place.copy_from_slice(row));
        }
        Rows::Int8 { codes, scales: Scales::F16(scales) } => {
            for ((place, codes), scale) in places.zip(codes.chunks_exact(dim)).zip(*scales) {
                let scale = scale.to_f32();
                place
                    .iter_mut()
                    .zip(codes)
                    .for_each(|(x, code)| *x = f16::from_f32(f32::from(*code) * scale));
            }
        }
        // Other formats and scales do not occur with f16 elements: left at zero, they count as mismatches.
        _ => {}
    }
}
