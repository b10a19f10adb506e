//! The next token out of logits: the most likely one, or one drawn at a temperature from the most likely ones.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// How to choose. Holds the generator, so that an answer that is interrupted and computed again goes on as it would have.
#[derive(Debug)]
pub(crate) struct Sampler {
    temperature: f32,
    /// Tokens are drawn from the fewest whose probabilities sum to this.
    top_p: f32,
    rng: SmallRng,
}

impl Sampler {
    /// The same seed draws the same tokens from the same logits; without one, every answer is its own.
    pub(crate) fn new(temperature: f32, top_p: f32, seed: Option<u64>) -> Self {
        let rng = seed.map_or_else(SmallRng::from_os_rng, SmallRng::seed_from_u64);
        Sampler { temperature, top_p, rng }
    }

    /// None if no logit is a number, which a sound model does not give.
    pub(crate) fn sample(&mut self, logits: &[f32]) -> Option<u32> {
        let numbers = logits.iter().enumerate().filter(|(_, logit)| !logit.is_nan());
        let (best, &most) = numbers.reduce(|best, next| if next.1 > best.1 { next } else { best })?;
        // Below this, all other probabilities are zero in f32, and the division may overflow.
        if self.temperature < 1e-4 || self.top_p <= 0.0 || !most.is_finite() {
            return Some(best as u32);
        }
        let weight = |logit: f32| ((logit - most) / self.temperature).exp();
        let weights = logits.iter().map(|&logit| if logit.is_nan() { 0.0 } else { weight(logit) });
        let mut tokens: Vec<(u32, f32)> = (0..).zip(weights).filter(|(_, weight)| *weight > 0.0).collect();
        if self.top_p < 1.0 {
            let all: f32 = tokens.iter().map(|(_, weight)| weight).sum();
            tokens.sort_unstable_by(|(_, a), (_, b)| b.total_cmp(a));
            let mut sum = 0.0;
            let enough = tokens.iter().position(|(_, weight)| {
                sum += weight;
                sum >= self.top_p * all
            });
            tokens.truncate(enough.map_or(tokens.len(), |last| last + 1));
        }
        let sum: f32 = tokens.iter().map(|(_, weight)| weight).sum();
        let mut at = self.rng.random::<f32>() * sum;
        let drawn = tokens.iter().find(|(_, weight)| {
            at -= weight;
            at < 0.0
        });
        // Rounding may leave a last sliver.
        drawn.or(tokens.last()).map(|(token, _)| *token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(temperature: f32, top_p: f32, logits: &[f32]) -> Vec<u32> {
        let mut sampler = Sampler::new(temperature, top_p, Some(7));
        let mut counts = vec![0; logits.len()];
        (0..10_000).for_each(|_| counts[sampler.sample(logits).unwrap() as usize] += 1);
        counts
    }

    #[test]
    fn at_temperature_zero_the_most_likely_token_comes() {
        assert_eq!(counts(0.0, 1.0, &[0.1, 3.0, f32::NAN, 2.9]), [0, 10_000, 0, 0]);
        assert_eq!(counts(1.0, 0.0, &[0.1, 3.0, 2.9]), [0, 10_000, 0]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let counts = counts(1.0, 1.0, &[0.0, f32::ln(3.0), f32::NEG_INFINITY]);
        assert!((2_300..2_700).contains(&counts[0]) && counts[2] == 0, "{counts:?}");
        let hotter = self::counts(2.0, 1.0, &[0.0, f32::ln(9.0), f32::NEG_INFINITY]);
        assert!((2_300..2_700).contains(&hotter[0]), "{hotter:?}");
    }

    #[test]
    fn top_p_leaves_the_unlikely_out() {
        let logits = [f32::ln(0.5), f32::ln(0.3), f32::ln(0.2)];
        assert_eq!(counts(1.0, 0.7, &logits)[2], 0);
        assert!(counts(1.0, 0.9, &logits)[2] > 1_500);
    }

    #[test]
    fn a_seed_repeats_and_no_number_is_no_token() {
        let logits: Vec<f32> = (0..50).map(|at| (at % 7) as f32).collect();
        let draw = |seed| {
            let mut sampler = Sampler::new(1.0, 1.0, Some(seed));
            (0..20).map(|_| sampler.sample(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_eq!(Sampler::new(1.0, 1.0, None).sample(&[f32::NAN]), None);
        assert_eq!(Sampler::new(1.0, 1.0, None).sample(&[]), None);
    }
}
