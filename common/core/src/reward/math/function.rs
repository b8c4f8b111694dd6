//! Functions that formulas call by name.

use super::quantity::Quantity;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    Sin,
    Cos,
    Tan,
    Cot,
    Sec,
    Csc,
    Arcsin,
    Arccos,
    Arctan,
    Sinh,
    Cosh,
    Tanh,
    Exp,
    Ln,
    /// To base 10 unless another is given.
    Log,
}

const NAMES: &[(&str, Function)] = &[
    ("sin", Function::Sin),
    ("cos", Function::Cos),
    ("tan", Function::Tan),
    ("cot", Function::Cot),
    ("sec", Function::Sec),
    ("csc", Function::Csc),
    ("arcsin", Function::Arcsin),
    ("arccos", Function::Arccos),
    ("arctan", Function::Arctan),
    ("sinh", Function::Sinh),
    ("cosh", Function::Cosh),
    ("tanh", Function::Tanh),
    ("exp", Function::Exp),
    ("ln", Function::Ln),
    ("log", Function::Log),
    ("lg", Function::Log),
];

pub(super) fn named(name: &str) -> Option<Function> {
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, function)| *function)
}

impl Function {
    /// The function that `\sin^{-1}` and its like are.
    pub(super) fn inverse(self) -> Option<Self> {
        match self {
            Self::Sin => Some(Self::Arcsin),
            Self::Cos => Some(Self::Arccos),
            Self::Tan => Some(Self::Arctan),
            _ => None,
        }
    }

    /// Its value; only logarithms look at `base`.
    pub(super) fn of(self, argument: &Quantity, base: Option<Quantity>) -> Quantity {
        let function = match self {
            Self::Sin => f64::sin,
            Self::Cos => f64::cos,
            Self::Tan => f64::tan,
            Self::Cot => |x: f64| x.tan().recip(),
            Self::Sec => |x: f64| x.cos().recip(),
            Self::Csc => |x: f64| x.sin().recip(),
            Self::Arcsin => f64::asin,
            Self::Arccos => f64::acos,
            Self::Arctan => f64::atan,
            Self::Sinh => f64::sinh,
            Self::Cosh => f64::cosh,
            Self::Tanh => f64::tanh,
            Self::Exp => f64::exp,
            Self::Ln => f64::ln,
            Self::Log => match base {
                Some(base) => return argument.map(f64::ln).over(&base.map(f64::ln)),
                None => f64::log10,
            },
        };
        argument.map(function)
    }
}
