//! Every operation on a device against the plain formula on the CPU, on fresh random inputs.
//!
//! A new machine, driver or build can be trusted when this passes on it: `ingle check` runs it. Inputs are rounded to the
//! type of the device first, so what is left of a difference is the rounding of sums and results.

mod attention;
mod elementwise;
mod encoder;
mod linear;
mod sampling;
mod step;

use std::fmt;

use candle_core::{DType, Device, Tensor};

use crate::error::Result;

/// What came of one kind of check.
#[derive(Debug, Clone, PartialEq)]
pub struct Checked {
    /// Operation and types.
    pub name: String,
    /// Inputs tried.
    pub cases: usize,
    /// Largest difference, as a share of the largest value of its case.
    pub worst: f32,
    /// The most it may be.
    pub tolerance: f32,
    /// The first operation that failed, or the case that was worst if it is too far off.
    pub fault: Option<String>,
}

impl Checked {
    /// Whether all cases ran and are near enough.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.fault.is_none()
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, cases, worst, tolerance, fault } = self;
        let mark = if self.passed() { "ok  " } else { "FAIL" };
        write!(f, "{mark} {name:<44} {cases:>4} cases, at most {worst:.1e} off ({tolerance:.1e} allowed)")?;
        fault.as_ref().map_or(Ok(()), |fault| write!(f, ": {fault}"))
    }
}

/// Runs all checks on `device` with inputs of `seed`; `told` hears of each as it ends.
pub fn check_ops(device: &Device, seed: u64, told: &mut dyn FnMut(&Checked)) -> Vec<Checked> {
    let mut checker = Checker { device: device.clone(), random: Random(seed), done: Vec::new(), told };
    elementwise::check(&mut checker);
    linear::check(&mut checker);
    attention::check(&mut checker);
    encoder::check(&mut checker);
    step::check(&mut checker);
    sampling::check(&mut checker);
    checker.done
}

struct Checker<'a> {
    device: Device,
    random: Random,
    done: Vec<Checked>,
    told: &'a mut dyn FnMut(&Checked),
}

/// One result beside what it should be.
struct Pair {
    found: Tensor,
    wanted: Tensor,
    /// What a difference is a share of, if that is more than the largest wanted value.
    scale: Option<f32>,
    case: String,
}

impl Checker<'_> {
    /// Types of activations that the device computes in.
    fn dtypes(&self) -> &'static [DType] {
        if self.device.is_cpu() { &[DType::F32] } else { &[DType::F32, DType::BF16, DType::F16] }
    }

    /// Runs `cases`, which yields results and what they should be, and notes what came of them.
    fn run(
        &mut self,
        name: String,
        tolerance: f32,
        cases: impl FnOnce(&mut Random, &Device, &mut dyn FnMut(Pair) -> Result<()>) -> Result<()>,
    ) {
        let mut checked = Checked { name, cases: 0, worst: 0.0, tolerance, fault: None };
        let outcome = cases(&mut self.random, &self.device, &mut |pair| {
            let off = distance(&pair)?;
            checked.cases += 1;
            if off > checked.worst {
                checked.worst = off;
                checked.fault = (off > tolerance).then(|| pair.case.clone());
            }
            Ok(())
        });
        if let Err(error) = outcome {
            checked.fault = Some(error.to_string().lines().next().unwrap_or_default().to_owned());
        } else if checked.cases == 0 {
            checked.fault = Some("nothing was checked".to_owned());
        }
        (self.told)(&checked);
        self.done.push(checked);
    }
}

/// Largest difference, as a share of the largest value of the case; infinite for NaN and for other shapes.
fn distance(Pair { found, wanted, scale, .. }: &Pair) -> Result<f32> {
    if found.dims() != wanted.dims() {
        return Ok(f32::INFINITY);
    }
    let scale = scale.unwrap_or(0.0).max(largest(wanted)?).max(1e-3);
    let off = |(a, b): (f32, f32)| if (a - b).is_finite() { (a - b).abs() } else { f32::INFINITY };
    Ok(values(found)?.into_iter().zip(values(wanted)?).map(off).fold(0.0, f32::max) / scale)
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// Largest magnitude.
fn largest(x: &Tensor) -> Result<f32> {
    Ok(values(x)?.into_iter().fold(0.0, |max, x| max.max(x.abs())))
}

/// Rounding of results of `dtype`, and of sums of some hundred products before.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => 1.2e-2,
        DType::F16 => 2e-3,
        _ => 5e-4,
    }
}

/// splitmix64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From -1 to 1, on the CPU, rounded to `dtype` and given as f32.
    fn tensor(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let count = shape.iter().product();
        let values: Vec<f32> =
            (0..count).map(|_| (self.next() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_dtype(DType::F32)?)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap_or(0)
    }
}

/// `x` on `device` in `dtype`.
fn put(x: &Tensor, dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(x.to_device(device)?.to_dtype(dtype)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_operations_of_this_machine_are_right() {
        let mut lines = 0;
        let done = check_ops(&Device::Cpu, 1, &mut |_| lines += 1);
        let wrong: Vec<String> =
            done.iter().filter(|checked| !checked.passed()).map(ToString::to_string).collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(done.len() > 20 && lines == done.len(), "{} checks", done.len());
    }

    #[test]
    fn what_is_wrong_does_not_pass() {
        let mut told = Vec::new();
        let mut note = |checked: &Checked| told.push(checked.clone());
        let mut checker =
            Checker { device: Device::Cpu, random: Random(0), done: Vec::new(), told: &mut note };
        let pair = |found: &[f32], wanted: &[f32]| Pair {
            found: Tensor::new(found, &Device::Cpu).expect("a tensor"),
            wanted: Tensor::new(wanted, &Device::Cpu).expect("a tensor"),
            scale: None,
            case: format!("{found:?}"),
        };
        let cases: [(&[f32], &[f32], bool); 5] = [
            (&[1.0, 2.0], &[1.0, 2.0], true),
            (&[1.0, 2.001], &[1.0, 2.0], true),
            (&[1.1, 2.0], &[1.0, 2.0], false),
            (&[f32::NAN, 2.0], &[1.0, 2.0], false),
            (&[1.0], &[1.0, 2.0], false),
        ];
        for (found, wanted, right) in cases {
            checker.run("a pair".into(), 0.01, |_, _, check| check(pair(found, wanted)));
            assert_eq!(checker.done.last().expect("done").passed(), right, "{found:?}");
        }
        checker.run("nothing".into(), 0.01, |_, _, _| Ok(()));
        checker.run("an error".into(), 0.01, |_, _, _| Err(crate::error::argument("op", "refused")));
        assert!(told.iter().rev().take(2).all(|checked| !checked.passed()));
        // A good case after a bad one does not hide it.
        let mut note = |_: &Checked| {};
        let mut checker =
            Checker { device: Device::Cpu, random: Random(0), done: Vec::new(), told: &mut note };
        checker.run("two".into(), 0.01, |_, _, check| {
            check(pair(&[2.0], &[1.0]))?;
            check(pair(&[1.0], &[1.0]))
        });
        assert!(!checker.done[0].passed());
    }
}
