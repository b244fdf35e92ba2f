//! The keys of a model's description, of `config.json` and of GGUF metadata alike, that remember which were read.
//!
//! What was never read might change the computation: [`Keys::refuse_unknown`] names it.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::SIZE_LIMIT;
use crate::model::Error;

/// One object of a description.
pub(super) struct Keys<'a> {
    file: &'a str,
    /// What stands before each key in errors: the enclosing object, or GGUF's architecture, with a point.
    prefix: String,
    map: &'a Map<String, Value>,
    used: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Keys<'a> {
    pub fn new(file: &'a str, prefix: String, map: &'a Map<String, Value>) -> Self {
        Self { file, prefix, map, used: RefCell::default() }
    }
    pub fn bad(&self, key: &str, reason: &str) -> Error {
        Error::Key { file: self.file.to_owned(), key: format!("{}{key}", self.prefix), reason: reason.to_owned() }
    }
    /// Finds a value and remembers that it was asked for. Null is as good as absent.
    pub fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.used.borrow_mut().insert(key);
        self.map.get(key).filter(|v| !v.is_null())
    }
    /// The object under a key, as keys of its own.
    pub fn object(&self, key: &'static str) -> Result<Option<Keys<'a>>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.bad(key, "is not an object"))?;
        Ok(Some(Keys::new(self.file, format!("{}{key}.", self.prefix), map)))
    }
    pub fn optional_size(&self, key: &'static str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=SIZE_LIMIT).contains(n));
        size.map(Some).ok_or_else(|| self.bad(key, &format!("is not a number from 1 to {SIZE_LIMIT}")))
    }
    pub fn size(&self, key: &'static str) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.bad(key, "is missing"))
    }
    /// A number that may be 0, and is 0 where it is absent.
    pub fn count(&self, key: &'static str) -> Result<usize, Error> {
        if self.get(key).is_some_and(|v| v.as_u64() == Some(0)) {
            return Ok(0);
        }
        Ok(self.optional_size(key)?.unwrap_or(0))
    }
    pub fn number(&self, key: &'static str) -> Result<Option<f32>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().map(|n| n as f32).filter(|n| n.is_finite());
        number.map(Some).ok_or_else(|| self.bad(key, "is not a number"))
    }
    /// A number above 0, or absent.
    pub fn positive(&self, key: &'static str) -> Result<Option<f32>, Error> {
        match self.number(key)? {
            Some(number) if number <= 0.0 => Err(self.bad(key, "is not positive")),
            number => Ok(number),
        }
    }
    /// A number above 0 that must be there.
    pub fn need(&self, key: &'static str) -> Result<f32, Error> {
        self.positive(key)?.ok_or_else(|| self.bad(key, "is missing"))
    }
    pub fn boolean(&self, key: &'static str) -> Result<Option<bool>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.bad(key, "is not true or false"))
    }
    pub fn text(&self, key: &'static str) -> Result<Option<&'a str>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.bad(key, "is not a text"))
    }
    /// Refuses any value but one: what other values mean is not computed here.
    pub fn only(&self, key: &'static str, supported: impl Into<Value>) -> Result<(), Error> {
        let supported = supported.into();
        let same = |value: &Value| match (value.as_f64(), supported.as_f64()) {
            (Some(a), Some(b)) => a == b,
            _ => *value == supported,
        };
        match self.get(key) {
            Some(value) if !same(value) => {
                Err(self.bad(key, &format!("is {}, and only {supported} is supported", short(value))))
            }
            _ => Ok(()),
        }
    }
    /// Refuses keys that nobody asked for, unless they are known to change nothing or their value is neutral.
    pub fn refuse_unknown(&self, harmless: &[&str]) -> Result<(), Error> {
        let used = self.used.borrow();
        let known = |key: &str| used.contains(key) || harmless.contains(&key) || key.starts_with('_');
        match self.map.iter().find(|(key, value)| !known(key) && !neutral(value)) {
            Some((key, _)) => Err(self.bad(key, "is not supported")),
            None => Ok(()),
        }
    }
}

/// A value as an error shows it: nobody wants to read a whole list.
fn short(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        other => other.to_string().chars().take(60).collect(),
    }
}

fn neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(_) | Value::Bool(true) => false,
    }
}
