//! How much each expert's word counts: a conditional logit over candidates, its weights learnt online.
//!
//! The features of a candidate are the logarithms of what the experts give it; the weighted sum goes through a softmax, so
//! experts multiply where they agree. After each change the weights follow the gradient of the logarithmic loss
//! (AdaGrad): experts that were right of late count more. A weight is a sum of three: of everybody, of everybody in a
//! case of that kind (how much the user's own habits say here), and of the user.
//!
//! Beside the mix a few experts speak for themselves. These voices are blended by what they lost of late (multiplicative
//! weights over fading logarithmic losses), so that where one plain expert is all there is to know the mix cannot spoil it.

use serde::{Deserialize, Serialize};

use super::experts::{FEATURES, Features, INITIAL};

/// Kinds of cases that have weights of their own.
pub const KINDS: usize = 8;
/// Largest weight.
const MOST: f32 = 4.0;
/// Step of learning for everybody: in all cases, and in those of a kind. Measured on the traces of `campus` and on Markov
/// sources without geometry or times: steps that never fall cost 3 points of hits on the latter; steps of a third lose
/// half a point on random walks.
const RATES: [f32; 2] = [0.05, 0.03];
/// Squared gradients that are taken for granted: the first steps are no larger than the later.
const CALM: f32 = 6.0;
/// Step of learning for a user.
const USER_RATE: f32 = 0.001;
/// Share by which a user's weights return to everybody's at each change.
const FORGET: f32 = 0.002;
/// What is left of a loss after one change more: a user's, and everybody's.
const FADE: [f32; 2] = [0.99, 0.995];
/// What a loss of everybody's weighs beside the user's own.
const EVERYBODY: f32 = 0.3;
/// Largest single step of a gradient.
const STEEPEST: f32 = 3.0;

/// Weights over all users.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weights {
    shared: Features,
    kinds: [Features; KINDS],
    /// Sum of squares of the gradients.
    energy: Features,
}

/// What differs for a user.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Own {
    /// Empty before the first change.
    weights: Vec<f32>,
}

impl Default for Weights {
    fn default() -> Self {
        Self { shared: INITIAL, kinds: [[0.0; FEATURES]; KINDS], energy: [0.0; FEATURES] }
    }
}

fn sound(weight: &mut f32, otherwise: f32) {
    *weight = if weight.is_finite() { weight.clamp(-MOST, MOST) } else { otherwise };
}

impl Weights {
    /// The same within all bounds, whoever wrote them.
    pub fn checked(mut self) -> Self {
        self.shared.iter_mut().zip(INITIAL).for_each(|(weight, initial)| sound(weight, initial));
        self.kinds.iter_mut().flatten().for_each(|weight| sound(weight, 0.0));
        for energy in &mut self.energy {
            *energy = if energy.is_finite() { energy.clamp(0.0, 1e9) } else { 0.0 };
        }
        self
    }

    /// What weighs in a case of that kind.
    pub fn for_case(&self, kind: usize, own: &Own) -> Features {
        let mut weights = self.shared;
        let kind = self.kinds.get(kind).into_iter().flatten();
        weights.iter_mut().zip(kind).for_each(|(weight, more)| *weight += more);
        weights.iter_mut().zip(&own.weights).for_each(|(weight, more)| *weight += more);
        weights
    }

    /// Follows a gradient, everybody's weights and the user's.
    pub fn follow(&mut self, kind: usize, own: &mut Own, gradient: &Features) {
        own.weights.resize(FEATURES, 0.0);
        let mut unused = [0.0; FEATURES];
        let kind = self.kinds.get_mut(kind).unwrap_or(&mut unused);
        for (at, &gradient) in gradient.iter().enumerate() {
            let gradient = if gradient.is_finite() { gradient.clamp(-STEEPEST, STEEPEST) } else { 0.0 };
            self.energy[at] = (self.energy[at] + gradient * gradient).min(1e9);
            let step = gradient / (CALM + self.energy[at]).sqrt();
            for (weight, rate) in [&mut self.shared[at], &mut kind[at]].into_iter().zip(RATES) {
                *weight = rate.mul_add(step, *weight).clamp(-MOST, MOST);
            }
            let own = &mut own.weights[at];
            *own = USER_RATE.mul_add(gradient, *own * (1.0 - FORGET)).clamp(-MOST, MOST);
        }
    }
}

impl Own {
    /// The same within all bounds, whoever wrote them.
    pub fn checked(mut self) -> Self {
        self.weights.truncate(FEATURES);
        self.weights.iter_mut().for_each(|weight| sound(weight, 0.0));
        self.weights.shrink_to_fit();
        self
    }
}

/// Probabilities of candidates by their features; they add up to 1 unless there are none.
pub fn softmax<'a>(weights: &Features, candidates: impl Iterator<Item = &'a Features>) -> Vec<f32> {
    let score =
        |features: &Features| features.iter().zip(weights).map(|(value, weight)| value * weight).sum();
    let mut scores: Vec<f32> = candidates.map(score).collect();
    let most = scores.iter().copied().fold(f32::MIN, f32::max);
    scores.iter_mut().for_each(|score| *score = (*score - most).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|score| *score /= sum);
    scores
}

/// Of the logarithm of what a candidate was given, by the weights: its features less those expected.
pub fn gradient<'a>(
    features: impl Iterator<Item = &'a Features>,
    probabilities: &[f32],
    came: usize,
) -> Features {
    let mut gradient = [0.0; FEATURES];
    for (at, (features, probability)) in features.zip(probabilities).enumerate() {
        let share = f32::from(u8::from(at == came)) - probability;
        gradient.iter_mut().zip(features).for_each(|(sum, value)| *sum += share * value);
    }
    gradient
}

/// Voices beside the mix: experts whose word alone may be the best there is.
const ALONE: [usize; 6] = super::experts::ALONE;
/// Voices in all.
const VOICES: usize = ALONE.len() + 1;

/// How well the mix and single experts did of late: fading sums of their logarithmic losses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trust {
    losses: [f32; VOICES],
}

impl Trust {
    /// The same within all bounds, whoever wrote it.
    pub fn checked(mut self) -> Self {
        self.losses
            .iter_mut()
            .for_each(|loss| *loss = if loss.is_finite() { loss.clamp(0.0, 1e4) } else { 0.0 });
        self
    }

    /// Notes what each voice had given what came, for the user and for everybody.
    pub fn note(&mut self, everybody: &mut Self, mixed: f32, features: &Features) {
        for (trust, fade) in [self, everybody].into_iter().zip(FADE) {
            trust.fade(fade, mixed, features);
        }
    }

    fn fade(&mut self, fade: f32, mixed: f32, features: &Features) {
        let given = std::iter::once(mixed.max(1e-6).ln()).chain(ALONE.map(|expert| features[expert]));
        for (loss, given) in self.losses.iter_mut().zip(given) {
            *loss = (*loss * fade - given.clamp(-14.0, 0.0)).clamp(0.0, 1e4);
        }
    }

    /// Voices' weights by a user's and everybody's trust; they add up to 1.
    fn shares(&self, everybody: &Self) -> [f32; VOICES] {
        let mut shares = [0.0; VOICES];
        for (at, share) in shares.iter_mut().enumerate() {
            *share = -EVERYBODY.mul_add(everybody.losses[at], self.losses[at]);
        }
        let most = shares.iter().copied().fold(f32::MIN, f32::max);
        shares.iter_mut().for_each(|share| *share = (*share - most).exp());
        let sum: f32 = shares.iter().sum();
        shares.map(|share| share / sum)
    }

    /// What all voices together give each candidate, from what the mix gives it.
    pub fn blend<'a>(
        &self,
        everybody: &Self,
        mixed: &[f32],
        candidates: impl Iterator<Item = &'a Features>,
    ) -> Vec<f32> {
        let [share, alone @ ..] = self.shares(everybody);
        let blended = candidates.zip(mixed).map(|(features, mixed)| {
            let alone: f32 = ALONE
                .iter()
                .zip(alone)
                .filter(|(_, share)| *share > 1e-3)
                .map(|(&expert, share)| share * features[expert].exp())
                .sum();
            share * mixed + alone
        });
        let mut blended: Vec<f32> = blended.collect();
        let sum = blended.iter().sum::<f32>().max(1e-9);
        blended.iter_mut().for_each(|given| *given /= sum);
        blended
    }
}
