//! How much each expert's word counts: a conditional logit over candidates, its weights learnt online.
//!
//! The features of a candidate are the logarithms of what the experts give it; the weighted sum goes through a softmax, so
//! experts multiply where they agree. After each change the weights follow the gradient of the logarithmic loss
//! (AdaGrad): experts that were right of late count more. A weight is a sum of three: of everybody, of everybody in a
//! case of that kind (how much the user's own habits say here), and of the user.

use serde::{Deserialize, Serialize};

use super::experts::{FEATURES, Features, INITIAL};

/// Kinds of cases that have weights of their own.
pub const KINDS: usize = 8;
/// Largest weight.
const MOST: f32 = 4.0;
/// Step of learning for everybody.
const RATE: f32 = 0.02;
/// Step of learning for a user.
const USER_RATE: f32 = 0.01;
/// Share by which a user's weights return to everybody's at each change.
const FORGET: f32 = 0.002;
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
            let step = gradient / (1.0 + self.energy[at]).sqrt().mul_add(0.05, 0.95);
            for (weight, rate) in [(&mut self.shared[at], RATE), (&mut kind[at], RATE)] {
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
    let score = |features: &Features| features.iter().zip(weights).map(|(value, weight)| value * weight).sum();
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
