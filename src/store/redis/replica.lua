-- Returns the error of a read-only replica, which may be behind its primary; nil on a primary. The
-- command changes nothing, because GT only extends a lifetime, and no record expires before 1 ms
-- after the epoch. Call this only in a script that writes nothing afterwards, because after one
-- write command a full server accepts every other one.
local function replica()
  local tried = redis.pcall('PEXPIREAT', key, 1, 'GT')
  return type(tried) == 'table' and string.find(tried.err, 'READONLY', 1, true) and tried or nil
end
